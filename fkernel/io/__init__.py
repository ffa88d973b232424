"""File operations independent of content: atomic writes, locks, hashes, checksummed JSON, direct access, sizes."""

from fkernel.io.atomic import PARTIAL, atomic_directory, atomic_file, atomic_write, flush_to_disk
from fkernel.io.checksummed import checksummed_json, is_json, read_checksummed
from fkernel.io.direct import open_direct, read_direct
from fkernel.io.documents import parse_json
from fkernel.io.fingerprints import checksum, checksums, fingerprint, hash_json, tensor_chunks
from fkernel.io.locks import NO_ROOM, locked, plain_errors
from fkernel.io.paths import default_cache_root, inside
from fkernel.io.units import parse_bytes

__all__ = ["PARTIAL", "atomic_directory", "atomic_file", "atomic_write", "flush_to_disk"]
__all__ += ["checksum", "checksummed_json", "checksums", "fingerprint", "hash_json", "is_json", "read_checksummed"]
__all__ += ["open_direct", "read_direct", "tensor_chunks"]
__all__ += ["NO_ROOM", "default_cache_root", "inside", "locked", "parse_bytes", "parse_json", "plain_errors"]
