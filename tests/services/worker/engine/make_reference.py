"""Writes reference_tokens.json: what transformers' generate gives greedily in float32 on the default model.

    python -m tests.services.worker.engine.make_reference

Each entry also holds `margin`, the smallest lead of a chosen token's logit over the runner-up's. A prompt whose margin
is within what rounding differs by between machines and batch shapes would test luck, so such a prompt is refused:
change it.
"""

import json
from pathlib import Path
from typing import Any

import torch

REFERENCE_FILE = Path(__file__).parent / "reference_tokens.json"
OUTPUT_TOKENS = 64
SMALLEST_MARGIN = 2e-3  # logits; rounding moves them by about 1e-4

PASSAGE = """\
The mill stood where the valley narrows, and for two hundred years it had only one rule: never let the wheel run \
dry. Water came down from the lake through a channel of oak planks, past a wooden gate that the miller raised every \
morning before the first carts arrived. In spring the gate stayed half closed, because the snow on the ridge melted \
faster than the wheel could turn it into flour. In late summer it was raised to its highest notch, and even then the \
wheel moved so slowly that a child could count the paddles as they passed.

When Ilse inherited the mill from her uncle, she found a notebook under the floor of the grain loft. Every page was \
a table with four columns: the date, the height of the lake, the number of sacks ground, and a short remark. Most of \
the remarks were about the weather. Some were about people: who had paid, who had promised to pay, and who had \
brought barley and sworn it was wheat. On the last page, in a different hand, somebody had written that the wheel \
does not care who built it, only that the water keeps coming.

She spent the first winter learning the sound of the machine. A dry bearing sings, her neighbor told her, and a \
loose paddle knocks twice, once when it enters the water and once when it leaves. By February she could hear from \
her bed whether the gate had frozen. By March she had replaced eleven planks, two paddles and the rope that held the \
gate, and she had begun a notebook of her own. It had five columns, because she also wrote down what had surprised \
her.

The engineers came in the third year. They wanted to put a turbine where the wheel was, and they had drawings that \
showed the valley with straight lines in it. A turbine, they explained, needs a steady head of water, so the channel \
would have to be lined with concrete and the gate opened and closed by a motor. Ilse asked them what would happen \
when the lake was low. The motor would close the gate, they said, and the turbine would wait. She asked what the \
people who needed the power would do while the turbine waited. The oldest of the engineers laughed, and said that \
this was the first good question anybody had asked him in that valley.

They talked until the lamp ran out of oil. In the end they built the turbine beside the wheel and not in its place, \
with a second gate and a pond that held enough water for nine dry days. On the tenth day of the great drought the \
wheel stood still for the first time in living memory, and the turbine with it. Ilse took out her notebook and wrote \
under the fifth column: the pond should have been larger."""

# Prefixes of the passage, in tokens: they share blocks, and end inside, at and just after block boundaries of 16.
PASSAGE_LENGTHS = (1, 2, 15, 16, 17, 33, 64, 97, 128, 161, 250, 350, 480, 540)
TEXTS = (
    "The three states of matter are",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Dear Ms. Alvarez,\n\nThank you for your letter of 14 March 2021. I am writing to",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55,",
    "<|im_start|>user\nWrite a short poem about a river.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
)


def load_reference_model(folder: Path) -> Any:
    """The model through transformers in float32; end-of-sequence does not end its outputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model


def generate(model: Any, prompt: list[int]) -> tuple[list[int], float]:
    """OUTPUT_TOKENS greedy tokens, and the smallest margin among them."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=OUTPUT_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(output.logits).squeeze(1).topk(2).values
    return output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).min().item()


def prompts(folder: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    passage = tokenizer.encode(PASSAGE).ids
    assert len(passage) >= max(PASSAGE_LENGTHS), f"the passage has only {len(passage)} tokens"
    return [passage[:length] for length in PASSAGE_LENGTHS] + [tokenizer.encode(text).ids for text in TEXTS]


def main() -> None:
    from services.worker.model_store import DEFAULT_MODEL, resolve

    folder = resolve(DEFAULT_MODEL)
    model = load_reference_model(folder)
    entries = []
    for prompt in prompts(folder):
        output, margin = generate(model, prompt)
        print(f"prompt of {len(prompt)} tokens: smallest margin {margin:.4f}", flush=True)
        if margin < SMALLEST_MARGIN:
            raise SystemExit(f"the prompt of {len(prompt)} tokens has a near tie: change it")
        entries.append({"prompt": prompt, "output": output, "margin": round(margin, 5)})
    REFERENCE_FILE.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


if __name__ == "__main__":
    main()
