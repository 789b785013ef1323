"""All that people are shown: tables, the page, two artifacts compared."""
