"""What a step finds in `round.json`, without a registry and data."""

from osft.rounds.resolution import ResolvedRound
from osft.tracking.lineage import DataManifest

RESOLVED = ResolvedRound(
    base_model="org/model",
    parent_version=1,
    model="/checkpoint",
    task="new",
    earlier_tasks=(),
    data=DataManifest(uri="d", files=(), num_records=1, num_new=1),
    records="r.jsonl",
    nothing_to_learn="",
    earlier_data={},
    conversions={},
)
