"""What headers of adapters hold of the training that people may not want to publish: captions, paths, names of data sets."""

from __future__ import annotations

from collections.abc import Mapping

# Entries of kohya's tools, OneTrainer and ai-toolkit.
TRAINING_DATA = frozenset(
    {
        *("ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_datasets", "ss_bucket_info"),
        *("ss_training_comment", "ss_sd_model_name", "ss_vae_name", "ss_output_name", "ss_sample_prompts"),
        *("ss_session_id", "ot_config", "training_info"),
    }
)
NOTHING = frozenset({"", "None", "null", "{}", "[]"})


def training_data_in(metadata: Mapping[str, str] | None) -> tuple[str, ...]:
    """The entries of a header that hold some."""
    told = metadata or {}
    return tuple(sorted(key for key in TRAINING_DATA & told.keys() if told[key] not in NOTHING))


def without_training_data(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without these entries."""
    return {key: value for key, value in metadata.items() if key not in TRAINING_DATA}
