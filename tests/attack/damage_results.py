"""What prolora wrote itself and reads again: results, notes of failures, the cache."""

from damages import Damage, safetensors_header
from inputs import (
    list_cache,
    migrate,
    move_batch,
    use_cache,
    write_cache,
    write_collection,
    write_loras,
)
from sandbox import Box


def write_migrated(box: Box) -> None:
    write_collection(box)
    box.must(*migrate(box))


def write_batch(box: Box) -> None:
    write_loras(box)
    box.must(*move_batch(box))


CASES = {
    "notes of a migration": Damage(
        write_migrated, migrate, lambda box: list(box.out.rglob("*.failed.json")), 12
    ),
    "results of a batch": Damage(
        write_batch,
        move_batch,
        lambda box: list(box.out.rglob("*.safetensors")),
        header=safetensors_header,
    ),
    "cache": Damage(write_cache, use_cache, list_cache, kinds="cut flip stamp"),
}
