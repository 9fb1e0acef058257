"""Raw records -> tokens and loss masks -> micro-batches under a token budget."""

from osft.data.packing import MicroBatch, collate, plan_micro_batches
from osft.data.records import DataError, Record, read_records

__all__ = ["DataError", "MicroBatch", "Record", "collate", "plan_micro_batches", "read_records"]
