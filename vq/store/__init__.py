"""The store: codes of pictures with their captions, and the tokenizer that made them, in one folder.

    shard-00000.parquet …   rows of codes; each file is written at once and is a finished piece of work
    tokenizer/              a copy of the tokenizer, so that the codes can always be decoded
    rejects.jsonl           one line for each picture that could not be encoded: id, reason, detail
    manifest.json           written last: totals, and the SHA-256 of every other file

    work.py      what is to be encoded, cut into pieces: one piece, one shard
    shard.py     rows ↔ the bytes of a shard
    manifest.py  what a store is made of, and what it holds
    writer.py    encode_shard, StoreWriter, write_store
    rows.py      rows in memory
    reader.py    CodeStore

`write_store` and `CodeStore.open` are the two directions. What is written depends on pictures and tokenizer alone (no
times, no paths), so a job that was killed and run again leaves the same bytes as one that was not, and so does one
that many processes shared. The store does not know where pictures come from, how a tokenizer works, or what a language
model makes of the codes: it holds image-local codes in [0, K), never token ids.
"""

from vq.store.reader import CodeStore
from vq.store.rows import Rows, StoredPicture
from vq.store.shard import SPLITS
from vq.store.work import Loaded, Pictures, Piece, Pieces, Ranges, Record
from vq.store.writer import Outcome, StoreWriter, Unfinished, encode_shard, write_store

__all__ = [
    "SPLITS",
    "CodeStore",
    "Rows",
    "StoredPicture",
    "Loaded",
    "Record",
    "Pictures",
    "Pieces",
    "Ranges",
    "Piece",
    "Outcome",
    "Unfinished",
    "StoreWriter",
    "encode_shard",
    "write_store",
]
