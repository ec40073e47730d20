#!/bin/bash
# A merge by Jobs of the Hub, into a storage bucket, through its S3 gateway:
#   bash docs/distributed/hf-jobs.sh BASE ADAPTER NAMESPACE/BUCKET N, such as
#   bash docs/distributed/hf-jobs.sh meta-llama/Llama-3.1-70B me/my-adapter me/models 8
# The merged model is below `merged/` in the bucket. BASE and ADAPTER are on the Hub, or s3:// addresses in this bucket.
# Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to the S3 credentials of a token that may write (on the Hub: Settings,
# Access Tokens, Generate S3 credentials), and HF_TOKEN for private models.
# A bucket that is mounted as a volume does not do: of two jobs that write to one file, only the last one's bytes remain.
set -euo pipefail
base=$1 adapter=$2 namespace=${3%%/*} bucket=${3#*/} count=$4
: "${AWS_ACCESS_KEY_ID:?}" "${AWS_SECRET_ACCESS_KEY:?}" "${HF_TOKEN:?}"

job() {
  local command
  printf -v command '%q ' loratool merge "$base" "$adapter" -o "s3://$bucket/merged" "$@"
  hf jobs run --detach --quiet --flavor cpu-xl --timeout 12h \
    --secrets HF_TOKEN --secrets AWS_ACCESS_KEY_ID --secrets AWS_SECRET_ACCESS_KEY \
    --env "AWS_ENDPOINT_URL=https://s3.hf.co/$namespace" \
    python:3.12 bash -c "pip install -q 'loratool[s3]' && $command"
}

jobs=()
for number in $(seq "$count"); do
  jobs+=("$(job --part "$number/$count")")
done
hf jobs wait "${jobs[@]}"
hf jobs wait "$(job --finish)"
