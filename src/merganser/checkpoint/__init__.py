"""Where tensors come from and go: folders, shards, files and dictionaries, read and written piece by piece."""

from merganser.checkpoint._base import Checkpoint, name_of_folder, repository_of
from merganser.checkpoint._carry import CARD, output_config, side_files, tokenizer_folder
from merganser.checkpoint._digest import describe_file, sha256_range
from merganser.checkpoint._experts import average_experts
from merganser.checkpoint._file import FileCheckpoint, stamp_of
from merganser.checkpoint._files import FilePool, open_regular
from merganser.checkpoint._fitting import CONV1D_LAYERS, keeps_transposed, unique_endings
from merganser.checkpoint._folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, refuse_unmergeable
from merganser.checkpoint._json import parse_json, read_json
from merganser.checkpoint._memory import DictCheckpoint
from merganser.checkpoint._open import ModelLike, open_checkpoint, parts_of_reference
from merganser.checkpoint._safetensors import read_header
from merganser.checkpoint._writer import Shard, ShardWriter, index_of, lay_out, write_error

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "CARD",
    "CONV1D_LAYERS",
    "Checkpoint",
    "DictCheckpoint",
    "FileCheckpoint",
    "FilePool",
    "ModelLike",
    "Shard",
    "ShardWriter",
    "average_experts",
    "describe_file",
    "index_of",
    "is_adapter",
    "keeps_transposed",
    "lay_out",
    "name_of_folder",
    "open_checkpoint",
    "open_regular",
    "output_config",
    "parse_json",
    "parts_of_reference",
    "read_header",
    "read_json",
    "refuse_unmergeable",
    "repository_of",
    "sha256_range",
    "side_files",
    "stamp_of",
    "tokenizer_folder",
    "unique_endings",
    "write_error",
]
