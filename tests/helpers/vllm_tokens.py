"""What vLLM writes: run by the Python that has it, which is not that of the tests.

    python vllm_tokens.py '{"model": FOLDER, "adapter": FOLDER or null, "prompts": [[TOKEN, …], …], "count": N}'

prints the most likely tokens after each prompt as JSON.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(sys.argv[1])
    more = {"enable_lora": True, "max_lora_rank": 16} if job["adapter"] else {}
    model = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=4,
        **more,
    )
    answers = model.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(temperature=0, max_tokens=job["count"], ignore_eos=True, detokenize=False),
        lora_request=LoRARequest("it", 1, job["adapter"]) if job["adapter"] else None,
        use_tqdm=False,
    )
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))


if __name__ == "__main__":
    main()
