"""Facts about private parts of megatron-core and torch that this project relies on; run after an update of either."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_distributed
from index_pairs import write_pair
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.optimizer import _get_param_groups_and_buffers
from megatron.core.optimizer import optimizer as mcore_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.tensor_parallel import layers as mcore_layers
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer import torch_norm
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_lion"


def test_version() -> None:
    """For another version, check the tests below and every 'mcore 0.19.2:' comment, then change this line."""
    assert metadata.version("megatron-core") == "0.19.2"


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (DistributedOptimizer._set_main_param_and_optimizer_states, "self, model_param, tensors"),
        (DistributedOptimizer._get_main_param_and_optimizer_states, "self, model_param"),
        (DistributedOptimizer._get_model_param_range_map, "self, param"),
        (DistributedOptimizer.get_parameter_state_dp_zero, "self, use_gloo_comm, empty_data, return_on_all_ranks"),
        (DistributedOptimizer.load_parameter_state_from_fully_reshardable, "self, state_dict"),
        (DistributedOptimizer.load_parameter_state_from_dp_reshardable, "self, state_dict"),
        (mcore_optimizer.MegatronOptimizer.get_grads_for_grad_norm, "self, grad_norm_group"),
        (mcore_optimizer.MegatronOptimizer.get_grad_norm, "self"),
        (clip_grad_by_total_norm_fp32, "parameters, max_norm, total_norm, use_decoupled_grad"),
        (mcore_random._get_cuda_rng_state, "device, clone, graph_safe"),
        (mcore_random._set_cuda_rng_state, "new_state, device, graph_safe"),
        (
            filesystem_async.FileSystemWriterAsync.write_preloaded_data,
            "transform_list, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, kwargs",
        ),
        (filesystem_async.FileSystemWriterAsync.preload_tensors, "write_buckets, non_blocking"),
        (mcore_torch._replace_state_dict_keys_with_sharded_keys, "sharded_state_dict, keep_only_main_replica"),
        (BertModel._sanity_check_attention_and_get_attn_mask_dimension, "self"),
        (BlendedMegatronDatasetBuilder.build_generic_dataset, "cls, is_built_on_rank, synchronize_ranks, args"),
        (BlendedMegatronDatasetBuilder._build_megatron_datasets_parallel, "self, prefixes, split, sizes_per_dataset"),
        (
            BlendedMegatronDatasetBuilder._build_megatron_dataset_splits,
            "self, dataset_path, split, sizes, synchronize_ranks",
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_signatures(function: Any, parameters: str) -> None:
    found = inspect.signature(inspect.unwrap(function)).parameters
    assert ", ".join(found) == parameters


@pytest.mark.parametrize(
    ("function", "needed"),
    [
        (DistributedOptimizer.__init__, "optimizer config grad_scaler init_state_fn model_chunks per_model_buffers data_parallel_group "
                                        "data_parallel_group_gloo data_parallel_group_idx distributed_optimizer_instance_id"),
        (DistributedOptimizer.sharded_param_state_fully_reshardable, "model_sharded_state_dict is_loading"),
        (DistributedOptimizer.sharded_param_state_dp_reshardable, "model_sharded_state_dict is_loading"),
        (_get_param_groups_and_buffers, "model_chunks config filter_fn buffer_name"),
        (DynamicGradScaler.__init__, "initial_scale min_scale growth_factor backoff_factor growth_interval hysteresis"),
        (save_state_dict_async_plan, "state_dict storage_writer process_group coordinator_rank planner"),
        (mcore_torch.mcore_to_pyt_state_dict, "state_dict is_loading"),
        (mcore_torch.MCoreSavePlanner.__init__, "dedup_replicated_tensors"),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)  # fmt: skip
def test_parameters_that_we_name(function: Any, needed: str) -> None:
    found = inspect.signature(inspect.unwrap(function)).parameters
    assert not set(needed.split()) - set(found)


def test_index_files_are_written_in_place_and_read_unchecked() -> None:
    """Therefore data/index_cache.py has them built in another folder and compares them."""
    source = inspect.getsource(GPTDataset._build_document_sample_shuffle_indices)
    assert source.count("numpy.save(path_to_") == source.count("safe_numpy_load(path_to_") == 3


def test_ranks_wait_for_rank_0_without_hearing_of_its_errors() -> None:
    """Therefore data/blends.py builds without barriers."""
    for function in ("build_generic_dataset", "_build_megatron_datasets_parallel"):
        assert "barrier()" in inspect.getsource(getattr(BlendedMegatronDatasetBuilder, function))


def test_a_blend_without_weights_ends_after_one_pass() -> None:
    """Therefore data/blends.py adds the passes after it."""
    source = inspect.getsource(BlendedMegatronDatasetBuilder._build_blended_dataset_splits)
    assert "size_i = min(self.sizes[i], sum(weights_i))" in source
    assert "size = min(self.sizes[i], sum(weights))" in source


def test_a_sentence_is_read_on_into_the_next_one(tmp_path: Path) -> None:
    """data/bert_datasets.py reads all sentences of a sample in one call."""
    write_pair(tmp_path / "a", [2, 3, 1], [0, 3], range(6))
    reader = IndexedDataset(str(tmp_path / "a"))
    assert reader.get(1, 0, 4).tolist() == [2, 3, 4, 5]
    del reader


def test_linear_layers_ask_a_global_name_for_the_weight_gradient_product() -> None:
    """model/weight_gradients.py sets that name and the flag beside it."""
    assert isinstance(mcore_layers._grad_accum_fusion_available, bool)
    backward = inspect.getsource(mcore_layers.LinearWithGradAccumulationAndAsyncCommunication.backward)
    call = "fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_{}(total_input,grad_output,weight.main_grad)"
    for width in ("fp32", "fp16"):
        assert call.format(width) in "".join(backward.split())
    names = inspect.unwrap(mcore_layers.LinearWithGradAccumulationAndAsyncCommunication.backward).__code__.co_names
    assert "fused_weight_gradient_mlp_cuda" in names, "a global, not an import in the function"
    assert "not _grad_accum_fusion_available" in inspect.getsource(mcore_layers.ColumnParallelLinear.__init__)


def test_groups_are_kept_in_a_list_that_can_be_emptied() -> None:
    """parallel.py takes the groups from this list when a run ends."""
    assert isinstance(parallel_state._global_process_group_list, list | None)


def private_uses(path: Path) -> set[str]:
    """Returns the private names that a file imports from megatron-core or reads from an object of other code."""
    # Of tuples, os, sys, torch and our timer.
    ours = {
        "_replace", "_exit", "_current_frames", "_inductor", "_disable_dynamo", "_get_default_store", "_set_pg_timeout", "_time",
    }  # fmt: skip
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
            found |= {alias.name for alias in node.names if alias.name.startswith("_")}
        elif (
            isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith(("__", "_foreach_"))
        ):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= set() if own or node.attr in ours else {node.attr}
    return found


def test_private_parts_are_marked_and_listed() -> None:
    """A file that uses private parts has a 'mcore 0.19.2:' comment, and docs/design.md lists exactly these files."""
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    marked = {name for name, path in files.items() if "mcore 0.19.2: " in path.read_text(encoding="utf-8")}
    assert {name for name, path in files.items() if private_uses(path)} <= marked
    page = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    section = page.split("## Private parts of megatron-core")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\S+\.py)` \|", section, re.MULTILINE)) == marked


def test_state_keys_come_from_the_optimizers_name() -> None:
    """Therefore StatefulDistributedOptimizer has its own keys."""
    source = inspect.getsource(DistributedOptimizer.optimizer_state_keys.fget)
    assert '{"lion": ("exp_avg",)}' in source
    assert '("exp_avg", "exp_avg_sq")' in source


def test_torch_norm_refuses_sequence_parallelism() -> None:
    """Therefore model/mcore_settings.py builds the norm itself."""
    assert "sequence parallel not supported by torch LayerNorm" in inspect.getsource(torch_norm)


def test_a_save_would_spawn_a_manager() -> None:
    """Therefore train/checkpoint_tensors.py gives the writer a queue."""
    assert "Manager()" in inspect.getsource(filesystem_async.get_write_results_queue)
    assert hasattr(filesystem_async, "_results_queue")


def test_the_checkpoint_writer_passes_all_bytes_through_torchs_transforms() -> None:
    source = inspect.getsource(torch_filesystem._write_item)
    assert "transforms.transform_save_stream(" in source
    assert "stream.write(" not in source
    assert "_write_item(\n" in inspect.getsource(filesystem_async.FileSystemWriterAsync.write_preloaded_data)


def test_torchs_checkpoint_exception_is_no_exception() -> None:
    """Therefore `except Exception` around a load is not enough."""
    assert not issubclass(CheckpointException, Exception)


def test_torch_reads_tensors_with_weights_only() -> None:
    """Therefore a load is safe if `.metadata` was verified to hold no pickled objects."""
    source = inspect.getsource(FileSystemReader.read_data)
    assert source.count("torch.load(") == source.count("weights_only=True") == 1


def test_loss_scaler_keeps_its_counters_where_we_read_them() -> None:
    source = inspect.getsource(DynamicGradScaler)
    for name in ("_growth_tracker", "_hysteresis_tracker", "state_dict['scale']"):
        assert name in source.replace('"', "'")


def inner_facts(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """Returns facts that need a built optimizer: padded buckets, and the `step` of AdamW."""
    found: dict[str, Any] = {}
    for name, config in configs.items():
        with tiny.opened_run(config) as run:
            wrapper = run.optimizer.megatron
            plain = DistributedOptimizer.get_parameter_state_dp_zero(wrapper, False, False, True)
            parameter = next(iter(wrapper.model_param_group_index_map))
            loaded = dict(wrapper._get_main_param_and_optimizer_states(parameter))
            loaded.pop("step", None)
            try:
                with torch.no_grad():
                    DistributedOptimizer._set_main_param_and_optimizer_states(wrapper, parameter, loaded)
                complaint = None
            except KeyError as error:
                complaint = str(error)
            with torch.no_grad():
                wrapper._set_main_param_and_optimizer_states(parameter, loaded)
            key = next(iter(plain[0]))
            found[name] = {
                "upstream": plain[0][key]["param"].numel(),
                "unpadded": wrapper.buffers[0].numel_unpadded, "whole": wrapper.buffers[0].numel,
                "complaint": complaint, "keys": DistributedOptimizer.optimizer_state_keys.fget(wrapper),
            }  # fmt: skip
    return found


def test_facts_of_a_built_optimizer(tmp_path: Path) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus", vocab_size=100)
    padded = {"model__hidden_size": 36, "model__vocab_size": 100, "model__make_vocab_size_divisible_by": 4}
    configs = {
        name: tiny.tiny_config(tmp_path / name, corpus, optimizer__name=name, **padded)
        for name in ("lion", "sgd", "adamw")
    }
    for result in run_distributed(inner_facts, 2, configs):
        for name, facts in result.items():
            assert facts["upstream"] == facts["unpadded"] < facts["whole"], "upstream drops the padding"
            assert facts["complaint"] == ("'step'" if name == "adamw" else None), "loaded tensors hold no step"
        assert result["sgd"]["keys"] == ("exp_avg", "exp_avg_sq"), "upstream gives SGD Adam's keys"
