"""File operations independent of content: atomic writes, locks, hashes, checksummed JSON, direct access, sizes.

Everything that is written goes through here: under a temporary name that says who writes it, flushed to disk, renamed.
"""

from fkernel.io.atomic import (
    atomic_directory,
    atomic_file,
    atomic_write,
    check_writable,
    flush_to_disk,
    make_directory,
    remove_directory,
    remove_file,
    write_file,
)
from fkernel.io.checksummed import checksummed_json, is_json, read_checksummed
from fkernel.io.direct import open_direct, read_direct
from fkernel.io.documents import parse_json
from fkernel.io.fingerprints import (
    checksum,
    checksums,
    fingerprint,
    fingerprint_of_leaves,
    hash_json,
    tensor_chunks,
)
from fkernel.io.lines import append_line, cut_partial_line, cut_to
from fkernel.io.locks import locked
from fkernel.io.paths import default_cache_root, inside
from fkernel.io.refusals import NO_ROOM, explained, plain_errors
from fkernel.io.temporary import is_temporary, scratch_directory, sweep
from fkernel.io.tensors import DTYPES, safetensors_chunks, tensors_header
from fkernel.io.units import parse_bytes

__all__ = ["atomic_directory", "atomic_file", "atomic_write", "check_writable", "flush_to_disk", "make_directory"]
__all__ += ["append_line", "cut_partial_line", "cut_to", "is_temporary", "scratch_directory", "sweep", "write_file"]
__all__ += ["remove_directory", "remove_file"]
__all__ += ["checksum", "checksummed_json", "checksums", "fingerprint", "fingerprint_of_leaves", "hash_json"]
__all__ += ["is_json", "read_checksummed"]
__all__ += ["DTYPES", "open_direct", "read_direct", "safetensors_chunks", "tensor_chunks", "tensors_header"]
__all__ += [
    "NO_ROOM",
    "default_cache_root",
    "explained",
    "inside",
    "locked",
    "parse_bytes",
    "parse_json",
    "plain_errors",
]
