// Lets the page of docs/examples/browser write text in Chromium:
//     node browser.mjs CHROMIUM URL PROMPT TOKENS
// Prints JSON: text, load_seconds, and seconds for all that was written. Packages are those of the folder $HOSTS.

import { createRequire } from "node:module";
import { join } from "node:path";

const [executablePath, url, prompt, tokens] = process.argv.slice(2);
const puppeteer = await import(createRequire(join(process.env.HOSTS, "x.js")).resolve("puppeteer-core"));
const browser = await (puppeteer.default ?? puppeteer).launch({
  executablePath,
  args: ["--no-sandbox", "--disable-gpu"],
  protocolTimeout: 600_000,
});
try {
  const page = await browser.newPage();
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  // transformers.js asks for files that a model may have, as generation_config.json, and goes on without them.
  const missing = (text) => text.startsWith("Failed to load resource");
  page.on("console", (message) => message.type() === "error" && !missing(message.text()) && errors.push(message.text()));
  const until = async (condition) => {
    const done = page.waitForFunction(condition, { timeout: 300_000 });
    const failed = new Promise((_, reject) => {
      const timer = setInterval(() => errors.length && reject(new Error(errors.join("\n"))), 200);
      done.finally(() => clearInterval(timer)).catch(() => {});
    });
    await Promise.race([done, failed]);
  };
  await page.goto(url);
  await until(() => !document.querySelector("button").disabled);
  const loaded = await page.$eval("#state", (state) => state.textContent);
  await page.$eval("textarea", (area, text) => (area.value = text), prompt);
  await page.$eval("input", (input, count) => (input.value = count), tokens);
  await page.click("button");
  await until(() => / tokens in |stopped/.test(document.querySelector("#state").textContent));
  const state = await page.$eval("#state", (state) => state.textContent);
  if (state.includes("stopped")) throw new Error(state);
  console.log(JSON.stringify({
    text: await page.$eval("output", (output) => output.textContent),
    load_seconds: Number(loaded.match(/[\d.]+(?= s)/)[0]),
    decode_seconds: Number(state.match(/[\d.]+(?= s)/)[0]),
  }));
} finally {
  await browser.close();
}
