#!/bin/bash
# A merge by Jobs of the Hub, which share a storage bucket as a folder:
#   bash docs/distributed/hf-jobs.sh BASE ADAPTER BUCKET N, such as
#   bash docs/distributed/hf-jobs.sh meta-llama/Llama-3.1-70B me/my-adapter me/models 8
# The merged model is in the folder `merged` of the bucket. This file is an example that the tests do not run.
set -euo pipefail
base=$1 adapter=$2 bucket=$3 count=$4

job() {
  hf jobs run --detach --flavor cpu-xl --secrets HF_TOKEN --volume "hf://buckets/$bucket:/models" \
    python:3.12 bash -c "pip install -q loratool && loratool merge $base $adapter -o /models/merged $1"
}

for number in $(seq "$count"); do
  job "--part $number/$count"
done
echo "when all of them have ended (hf jobs ps), run:"
echo "  hf jobs run --flavor cpu-xl --secrets HF_TOKEN --volume hf://buckets/$bucket:/models python:3.12 bash -c \\"
echo "    'pip install -q loratool && loratool merge $base $adapter -o /models/merged --finish'"
