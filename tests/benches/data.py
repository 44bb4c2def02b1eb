"""Encodes .jsonl files as Python's `tokenizers` does it. Usage: data.py TOKENIZER_JSON FOLDER

Prints one JSON document: the tokens, and the seconds from the first file's opening to the last token, for
`encode_batch` and for `encode_batch_fast`, which keeps no offsets. Nothing is written and no duplicate is looked
for: less than what it is compared with does.
"""

import json
import pathlib
import sys
import time

import tokenizers

BATCH_DOCUMENTS = 1000


def documents(folder):
    for path in sorted(pathlib.Path(folder).glob("*.jsonl")):
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def batches(folder):
    batch = []
    for text in documents(folder):
        batch.append(text)
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def measure(encode, folder):
    began = time.perf_counter()
    tokens = sum(len(encoding.ids) for batch in batches(folder) for encoding in encode(batch))
    return {"tokens": tokens, "seconds": time.perf_counter() - began}


tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
tokenizer.encode_special_tokens = True
ways = {"encode_batch": tokenizer.encode_batch, "encode_batch_fast": tokenizer.encode_batch_fast}
result = {
    name: measure(lambda batch, encode=encode: encode(batch, add_special_tokens=False), sys.argv[2])
    for name, encode in ways.items()
}
print(json.dumps({"version": tokenizers.__version__, **result}))
