#!/usr/bin/env bash
# Compresses what a manifest names, checks what came of it, and ends with the worst status: 0 only if every artifact is
# there, whole, and keeps its gates. For any CI system; for GitHub see github-actions.yml beside this.
#
#     batch_in_ci.sh models.yaml artifacts
#
# Keep the folder `artifacts` from one build to the next: what is complete and made of the same content is not made again.
# Show artifacts/summary.xml as the build's test results, and offer the report.html of every artifact for download.
set -u
manifest="${1:?usage: batch_in_ci.sh MANIFEST [FOLDER]}"
artifacts="${2:-artifacts}"

compress batch "$manifest" -o "$artifacts" --resume
status=$?

for report in "$artifacts"/*/compression.json; do
    directory="$(dirname "$report")"
    case "$directory" in
        *.failed | *.partial | "$artifacts/*") continue ;;
    esac
    # Hashes, provenance, and that onnxruntime opens it: what a cache or a copy may have damaged.
    compress verify --quick "$directory" || status=5
done
exit "$status"
