"""strategy=fsdp on processes of a CPU (gloo): number formats, groups, compiled blocks, steps left
out. That two processes train as one, test_ranks.py shows."""

import pytest
import torch
from runs import ALGORITHMS, differences, finish, ranks, read, run, tiny
from test_health import judged_late, overflow, poisoned
from test_ranks import BY_ONE, LAST, TOLERANCE, equal_runs, equal_states

import diffusion
from diffusion import Diffusion
from models import compiling
from models.block import Block
from training import distributed
from training.log_reading import read_log
from training.logged import LOGGED, Logged

FSDP, HYBRID = ["strategy=fsdp"], ["strategy=fsdp", "strategy.replicate=2"]
STRATEGIES = {"ddp": [], "fsdp": FSDP, "hybrid": HYBRID}
# validates nothing and computes without the rounding of gradients near 0, which AdamW magnifies
STEPS = ["trainer.limit_val_batches=0", "algo.clip_search_widths=[]", "optim.eps=1e-4"]
# six steps, of which the fourth is followed by a validation, and one save, at the end: to put parts
# together for a checkpoint takes longer than a step. That saves in between disturb nothing,
# test_ranks.py and checkpoint_io/test_sharded_runs.py show.
SHORT = ["trainer.max_steps=6", "callbacks.checkpoint_monitor=null"]
SHORT += ["callbacks.checkpoint_every_n_steps.every_n_train_steps=100"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Overrides: dropout 0, whose masks depend on the number of processes."""
    words = tiny(tmp_path_factory.mktemp("data"))
    words += [*ALGORITHMS["bamdlm"], "model.dropout=0", "loader.eval_global_batch_size=8"]
    return [*words, *SHORT]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    code, text = run([*base, *BY_ONE, f"checkpointing.save_dir={folder / 'run'}"], folder / "log")
    assert code == 0, text
    return folder


def trained(base, folder, count, *more, before=None, timeout=120):
    """The folder of a run of so many processes."""
    folder.mkdir(exist_ok=True)
    words = [f"trainer.devices={count}", f"loader.batch_size={8 // count}"]
    words += [f"loader.eval_batch_size={8 // count}", "trainer.val_check_interval=4"]
    words += [*more, f"checkpointing.save_dir={folder / 'run'}"]
    started = ranks(count, [*base, *words], folder / "log.txt", before=before)
    assert finish(started, timeout) == [0] * count, started[0].text()
    return folder


def losses(folder):
    return read_log(folder / "run/metrics.csv")["trainer/loss"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_four_processes_train_as_one(strategy, base, alone, tmp_path):
    equal_runs(trained(base, tmp_path, 4, *STRATEGIES[strategy]), alone)


def test_a_run_moves_between_groups_and_one_process(base, alone, tmp_path):
    trained(base, tmp_path, 4, *HYBRID, "trainer.max_steps=2")
    words = [*base, *BY_ONE, "trainer.max_steps=4", f"checkpointing.save_dir={tmp_path / 'run'}"]
    code, text = run(words, tmp_path / "log")
    assert code == 0, text
    trained(base, tmp_path, 4, *HYBRID)
    equal_runs(tmp_path, alone, ["trainer/loss"])


@pytest.mark.slow
def test_a_run_moves_between_all_strategies(base, alone, tmp_path):
    ways = [(2, []), (4, HYBRID), (2, FSDP), (4, []), (4, FSDP)]
    for step, (count, strategy) in enumerate(ways):
        trained(base, tmp_path, count, *strategy, f"trainer.max_steps={step + 2}")
    equal_runs(tmp_path, alone, ["trainer/loss"])


def logs_a_weight(rank):
    LOGGED["trainer/weight"] = Logged(
        lambda steps: steps.module.backbone.blocks[-1].mlp[0].weight.abs().mean(), doc="its size"
    )


def test_a_figure_of_shared_weights_is_that_of_whole_ones(base, tmp_path):
    """Each device has a part, so all must be asked."""
    found = []
    for name in ("ddp", "fsdp"):
        folder = trained(base, tmp_path / name, 2, *STRATEGIES[name], before=logs_a_weight)
        found.append(read_log(folder / "run/metrics.csv")["trainer/weight"])
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=TOLERANCE)


def formats(rank):
    """In a pass: linear layers of blocks in bfloat16, what autocast keeps in float32 as it is."""
    real, end = Block.forward, Diffusion.on_train_end

    def forward(self, *arguments):
        found = {type(p) for p in self.parameters()}
        assert found == {torch.nn.Parameter}, found  # they are put together
        layers = self.attn_qkv, self.attn_out, self.mlp[0], self.mlp[2], self.adaLN_modulation
        assert {p.dtype for layer in layers for p in layer.parameters()} == {torch.bfloat16}
        assert self.norm1.weight.dtype == self.norm2.weight.dtype == torch.float32
        Diffusion.on_train_end = at_end
        return real(self, *arguments)

    def at_end(self):
        end(self)
        print("all formats were seen", flush=True)
        assert {p.dtype for p in self.parameters()} == {torch.float32}

    Block.forward = forward


def test_bf16_is_sent_and_losses_are_those_of_ddp_with_autocast(base, tmp_path):
    """The same products of the same rounded weights, bit for bit until the weights change: the norm
    of the gradient is summed in another order, and a weight near a tie is then rounded elsewhere.
    Between one process and several, sums of bfloat16 gradients differ too, also under ddp."""
    words = [*base, "trainer.precision=bf16", "optim.eps=1e-4"]
    theirs = trained(words, tmp_path / "ddp", 2)
    ours = trained(words, tmp_path / "fsdp", 2, *FSDP, before=formats)
    assert "all formats were seen" in (ours / "log-0.txt").read_text()
    assert losses(ours)[1] == losses(theirs)[1]
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    equal_states(read(ours / LAST), read(theirs / LAST))
    save_dir = f"checkpointing.save_dir={tmp_path / 'run'}"
    code, text = run([*words, *BY_ONE, save_dir], tmp_path / "log")
    assert code == 0, text
    assert losses(ours) == pytest.approx(losses(tmp_path), rel=2e-3)


def test_bf16_groups_of_four_train_as_ddp(base, tmp_path):
    words = [*base, "trainer.precision=bf16", *STEPS, "trainer.max_steps=4"]
    theirs = trained(words, tmp_path / "ddp", 4)
    ours = trained(words, tmp_path / "hybrid", 4, *HYBRID)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)


def test_layers_that_are_made_again_give_the_same_bits(base, tmp_path):
    """Of three layers selective makes one again, and full two."""
    words = [*base, *STEPS, *FSDP, "trainer.precision=bf16", "model.n_blocks=3"]
    words += ["model.dropout=0.2", "trainer.max_steps=3"]
    kept, *made_again = (
        read(trained(words, tmp_path / name, 2, f"model.activation_checkpointing={name}") / LAST)
        for name in ("none", "full", "selective")
    )
    for ours in made_again:
        assert differences(ours["state_dict"], kept["state_dict"]) == []


def of_two_blocks(rank):
    """Units of two blocks and of one, in place of one unit of three."""
    real = distributed.share_out

    def share_out(module):
        sizes = {sum(p.numel() for p in block.parameters()) for block in module.backbone.blocks}
        (size,) = sizes
        distributed.UNIT_BYTES, distributed.WHOLE_BYTES = 2 * 4 * size, 0
        real(module)
        units = {id(block._get_fsdp_state()) for block in module.backbone.blocks}
        print(len(module.backbone.blocks), "blocks in", len(units), "units", flush=True)

    distributed.share_out = share_out


def test_which_blocks_are_put_together():
    mib = 1 << 20
    for size, blocks, lengths in (
        (15 * mib, 12, [12]),  # 180 MiB
        (20 * mib, 12, [3, 3, 3, 3]),
        (30 * mib, 7, [2, 2, 2, 1]),
        (115 * mib, 4, [1, 1, 1, 1]),
    ):
        made = distributed.units([size] * blocks, alone=False)
        assert [len(unit) for unit in made] == lengths
        assert [number for unit in made for number in unit] == [*range(blocks)]
        assert len(distributed.units([size] * blocks, alone=True)) == blocks


def test_the_size_of_units_changes_no_bit(base, tmp_path):
    """A validation by averages comes after step 4."""
    words = [*base, *FSDP, "model.n_blocks=3"]
    at_once = read(trained(words, tmp_path / "at_once", 2) / LAST)
    in_two = trained(words, tmp_path / "in_two", 2, before=of_two_blocks)
    assert "3 blocks in 2 units" in (in_two / "log-0.txt").read_text()
    assert differences(read(in_two / LAST)["state_dict"], at_once["state_dict"]) == []


def parts_alone(rank):
    """Neither an average nor a gradient is put together while it is trained."""
    real, wholes = distributed.DTensor.full_tensor, []

    def full_tensor(self, **kwargs):
        wholes.append(self.numel())
        return real(self, **kwargs)

    end = Diffusion.on_train_end
    update = diffusion.averaging.update

    def updated(module):
        mine = diffusion.averaging.averaged_weights(module)
        shadow = module.ema.shadow
        assert all(shadow[name].shape == part.shape for name, part in mine)
        named = list(module.backbone.named_parameters())
        assert sum(map(torch.numel, shadow.values())) < 0.6 * sum(p.numel() for _, p in named)
        update(module)
        assert not wholes

    def at_end(self):
        end(self)
        print("the average was in parts", flush=True)

    distributed.DTensor.full_tensor = full_tensor
    diffusion.averaging.update = updated
    Diffusion.on_train_end = at_end


def test_the_average_stays_shared_out(base, tmp_path):
    words = [*STEPS, "trainer.max_steps=4"]
    folder = trained(base, tmp_path, 2, *FSDP, *words, before=parts_alone)
    assert "the average was in parts" in (folder / "log-0.txt").read_text()


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_steps_that_are_not_finite_are_left_out_one_step_late(strategy, base, tmp_path):
    """As on GPUs, where the host waits for no step. In step 2 a gradient of all is infinite, in
    step 4 a loss of one. Then the run goes on from its checkpoint."""
    count = 4 if strategy == "hybrid" else 2
    made = []
    for late in (False, True):

        def patch(rank, late=late):
            if late:
                judged_late()
            overflow()
            poisoned({4} if rank == 1 else set())

        words = [*STRATEGIES[strategy], *STEPS]
        folder = tmp_path / f"late={late}"
        trained(base, folder, count, *words, "trainer.max_steps=5", before=patch)
        text = (folder / "log-0.txt").read_text()
        for step, what in ((2, "gradient"), (4, "loss")):
            assert f"step {step} left out: it has a {what} that is not finite" in text
        last = read(folder / LAST)
        assert last["ema"]["num_updates"] == 3
        assert float(last["optimizer_states"][0]["state"][0]["step"]) == 3
        trained(base, folder, count, *words, before=patch_late if late else None)
        made.append(read(folder / LAST))
    at_once, late = made
    assert late["ema"]["num_updates"] == 4
    assert torch.isfinite(late["state_dict"]["backbone.blocks.0.attn_qkv.weight"]).all()
    equal_states(late, at_once)


def patch_late(rank):
    judged_late()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["model.activation_checkpointing=selective"]])
def test_compiled_blocks_train_as_those_that_are_not(more, base, tmp_path):
    words = [*base, *STEPS, *FSDP, "model.n_blocks=3", *more]
    plain = trained(words, tmp_path / "plain", 2)
    compiled = trained(words, tmp_path / "compiled", 2, "model.compile=true", timeout=600)
    assert losses(compiled) == pytest.approx(losses(plain), rel=TOLERANCE)
    equal_states(read(compiled / LAST), read(plain / LAST))


def traced(rank):
    """The compiler reads the blocks and leaves them to torch: seconds, where it takes minutes. Only
    that of the first rank: they all run one program, and to read it takes longest here."""
    if rank:
        torch.compile = lambda function: function
        return
    torch._dynamo.reset()  # the process has what tests before this one compiled
    compiling.compiled.cache_clear()
    real, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    torch.compile = lambda function: real(function, backend=backend, fullgraph=True)
    end = Diffusion.on_train_end

    def at_end(self):
        end(self)
        print(f"graphs: {len(graphs)}", flush=True)

    Diffusion.on_train_end = at_end


def test_one_graph_serves_all_blocks_but_the_last(base, tmp_path):
    """With no break in it: what fsdp does around a block is outside. The loss has another one."""
    words = [*base, *STEPS, *FSDP, "trainer.precision=bf16", "model.n_blocks=3"]
    words += ["trainer.max_steps=2"]
    plain = trained(words, tmp_path / "plain", 2)
    ours = trained(words, tmp_path / "traced", 2, "model.compile=true", before=traced)
    assert "graphs: 3\n" in (ours / "log-0.txt").read_text()
    assert losses(ours) == pytest.approx(losses(plain), rel=TOLERANCE)
