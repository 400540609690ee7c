"""``datasets.map`` with Hugging Face's fast tokenizer, as its documentation has it: a program.

    python prepare_datasets.py INPUT.jsonl TOKENIZER_FOLDER CACHE_FOLDER

Prints counts and the first documents' ids as JSON.
"""

from __future__ import annotations

import json
import sys

FIRST = 20


def main() -> None:
    import datasets
    import pyarrow.compute
    import transformers

    source, tokenizer_folder, cache = sys.argv[1:]
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # of speeches that are longer than the model
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, use_fast=True)
    assert tokenizer.is_fast

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(
            batch["text"], add_special_tokens=False, return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]  # fmt: skip
        return {"input_ids": ids}

    texts = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
    made = texts.map(tokenize, batched=True, remove_columns=["text"])
    column = made.data.column("input_ids")
    found = {
        "documents": len(made),
        "tokens": pyarrow.compute.sum(pyarrow.compute.list_value_length(column)).as_py(),
        "first": made[:FIRST]["input_ids"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
