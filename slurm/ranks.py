"""The ranks of a job: their number on each node, and the GPUs of each."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from longctx.config import Mesh
from recipes.common.settings import section
from slurm.settings import Launcher, SubmitSettings


def meshes_of(configs: Sequence[DictConfig]) -> list[Mesh]:
    """Return the meshes of the runs ``configs`` (one rank if they have none), and of variants with as many ranks.

    Raises ValueError if the runs have different numbers of ranks.
    """
    meshes = list(map(_mesh_of, configs))
    if len(sizes := {mesh.ranks for mesh in meshes}) > 1:
        raise ValueError(
            f"the sweep's runs have {' and '.join(map(str, sorted(sizes)))} ranks, and must all have the same number "
            "of ranks: submit meshes of different sizes separately"
        )
    variants = [mesh for config in configs for mesh in _variant_meshes(config)]
    return [*meshes, *(mesh for mesh in variants if mesh.ranks == meshes[0].ranks)]


def _mesh_of(config: DictConfig) -> Mesh:
    return section(config, "mesh", Mesh) if "mesh" in config else Mesh()


def _variant_meshes(config: DictConfig) -> list[Mesh]:
    """Return the meshes of the items of eval's setting ``variants`` that change the mesh."""
    changes = [item["mesh"] for item in config.get("variants") or () if isinstance(item, DictConfig) and "mesh" in item]
    return [_mesh_of(OmegaConf.create({"mesh": OmegaConf.merge(config.mesh, change)})) for change in changes]


def ranks_per_node(mesh: Mesh, settings: SubmitSettings) -> int:
    """Return the number of ranks that each node starts.

    Raises ValueError unless the nodes hold exactly the ranks of ``mesh``, with each tensor-parallel group on one node.
    """
    nodes, ranks = settings.nodes, settings.ranks_per_node or mesh.ranks // settings.nodes
    if nodes * ranks != mesh.ranks:
        wrong = f"x ranks_per_node={ranks} is not" if settings.ranks_per_node else "does not divide"
        raise ValueError(
            f"nodes={nodes} {wrong} the mesh's {mesh.ranks} ranks ({mesh}): change nodes or ranks_per_node, or use a "
            f"mesh of {nodes * max(1, ranks)} ranks"
        )
    if ranks % mesh.tp:
        groups = mesh.ranks // mesh.tp
        fewer = max(n for n in range(1, nodes) if groups % n == 0)
        also = f" ranks_per_node={mesh.ranks // fewer}" if settings.ranks_per_node else ""
        raise ValueError(
            f"mesh.tp={mesh.tp} does not divide the {ranks} rank(s) of a node: tensor-parallel ranks exchange data in "
            f"every layer and must share a node; use nodes={fewer}{also}, or other axes of the mesh whose product is a "
            f"multiple of {nodes}"
        )
    return ranks


def gpus_per_rank(launcher: Launcher, configs: Sequence[DictConfig]) -> int:
    """Return the number of GPUs that each rank gets: that of ``launcher``, or else one for runs on cuda.

    A run of eval on one rank starts the ranks of each variant itself, and gets the GPUs of the largest one.

    Raises ValueError if the launcher has no number, and only some of the runs are on cuda.
    """
    if launcher.gpus_per_rank is not None:
        return launcher.gpus_per_rank
    devices = sorted({str(OmegaConf.select(config, "run.device")) for config in configs})
    if len(devices) > 1:
        raise ValueError(
            f"the sweep's runs have run.device={' and '.join(devices)}, and all of its runs get the same GPUs: submit "
            "the devices separately, or set launcher.gpus_per_rank=1"
        )
    if devices != ["cuda"]:
        return 0
    alone = [config for config in configs if _mesh_of(config).ranks == 1]
    return max((mesh.ranks for config in alone for mesh in _variant_meshes(config)), default=1)
