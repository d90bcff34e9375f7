"""Wrong command lines: each has its one message, nothing is written, and the exit code is 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import main
from modes import cli
from settings.keys import CONFIGS
from settings.multirun import expand
from settings.overrides import DEAD

MAIN = CONFIGS.parent / "main.py"
TRAIN = ["data=shakespeare", "wandb=null"]
PPL = [*TRAIN, "mode=ppl_eval", "eval.checkpoint_path=org/model"]
SAMPLE = [*TRAIN, "mode=sample_eval", "eval.checkpoint_path=org/model"]
BLOCKS = ["block_size=4"]
CLIP = "algo.clip_search_widths"
COUNTS = "training.noise=counts"
SIZES = "training.block_sizes={4: 1, 16: 3}"
GROWN = "training.block_schedule={0: 4, 9: 16}"
LEARNT = [COUNTS, "training.count_law=learnt"]

# context: (arguments, what the one line says)
WRONG = [
    # words
    (TRAIN, ["modle.length=3"], "modle.length is not a setting. Did you mean model.length?"),
    (TRAIN, ["lr=1"], "lr is not a setting. Did you mean optim.lr?"),
    (TRAIN, ["batch_size=1"], "batch_size is not a setting. Did you mean loader.batch_size or"),
    (TRAIN, ["xyzzy=1"], "xyzzy is not a setting. python main.py --help lists them all"),
    (TRAIN, ["++training.emma=0"], "training.emma is not a setting. Did you mean training.ema?"),
    (TRAIN, ["sampling.n_texts=4"], "sampling.n_texts is not a setting. python main.py --help"),
    (TRAIN, ["sampling.batchsize=4"], "Did you mean sampling.batch_size?"),
    (TRAIN, ["loader={batch_sise: 4}"], "loader.batch_sise is not a setting"),
    (TRAIN, ["algo.block_size=4"], "algo.block_size does not exist: use block_size"),
    (TRAIN, ["trainer.max_epochs=4"], "use trainer.max_steps: the training data are one endless"),
    (TRAIN, ["hydra.run.dir=x"], "hydra.run.dir does not exist: use checkpointing.save_dir"),
    (TRAIN, ["hydra.verbose=1"], "hydra.verbose does not exist: the run folder is"),
    (TRAIN, ["--multirun"], "is not an option: settings are key=value; python main.py -m starts"),
    (TRAIN, ["quickstart"], "'quickstart' is not key=value"),
    (TRAIN, ["=40"], "'=40' names no setting: write key=value, without spaces"),
    (TRAIN, ["wandb.name=a]b"], "'wandb.name=a]b' cannot be read"),
    (
        TRAIN,
        ["seed=1,2"],
        "names several values: give one, or put quotes round a comma; with -m each",
    ),
    (TRAIN, ["model@net=tiny"], "'model@net=tiny': packages (@) are not offered"),
    (TRAIN, ["seed=${nowhere}"], "seed: Interpolation key 'nowhere' not found"),
    (TRAIN, ["seed=${eval:'2'}"], "seed: Unsupported interpolation type eval"),
    (["data=shakespeare"], ["wandb=null", "wandb.name=x"], "wandb.name=x comes after wandb=null"),
    (["data=shakespeare"], ["wandb=null", "wandb.notes=a, b"], "wandb.notes=a, b comes after"),
    # groups
    (
        ["wandb=null"],
        ["data=shakespear"],
        "data=shakespear does not exist. Did you mean shakespeare?",
    ),
    (
        TRAIN,
        ["model=huge"],
        "model=huge does not exist. Choices: llama-135m, llama-tiny, medium, small, tiny, xl",
    ),
    (TRAIN, ["algo=[mdlm]"], "algo=['mdlm'] must be one of: ar, bamdlm"),
    (TRAIN, ["~algo"], "algo=null does not exist. Choices: ar, bamdlm"),
    (TRAIN, ["callbacks=[checkpoint]"], "callbacks=checkpoint does not exist."),
    (
        TRAIN,
        ["experiment=train_owt_dimamba"],
        "experiment=train_owt_dimamba does not exist. Did you",
    ),
    # types
    (TRAIN, ["trainer.max_steps=many"], "trainer.max_steps=many must be a whole number"),
    (TRAIN, ["seed=1.5"], "seed=1.5 must be a whole number"),
    (TRAIN, ["seed=True"], "seed=True must be a whole number"),
    (TRAIN, ["seed=null"], "seed=null must be a whole number"),
    (TRAIN, ["optim.lr=fast"], "optim.lr=fast must be a number"),
    (TRAIN, ["data.wrap=maybe"], "data.wrap=maybe must be True or False"),
    (
        TRAIN,
        ["trainer.limit_val_batches=few"],
        "trainer.limit_val_batches=few must be a number or null",
    ),
    (TRAIN, [f"{CLIP}=0.5"], f"{CLIP}=0.5 must be a list like [0.5,0.6]"),
    (TRAIN, [f"{CLIP}=[a]"], f"{CLIP}=['a'] must be a list like [0.5,0.6]"),
    (TRAIN, ["loader=5"], "loader=5 must be a section; its settings are global_batch_size, "),
    (TRAIN, ["data.train=[a,b]"], "data.train=['a', 'b'] must be text or null"),
    (TRAIN, ["trainer.devices=[0,1]"], "trainer.devices=[0, 1] must be a whole number or null"),
    # choices and ranges
    (TRAIN, ["mode=eval"], "mode=eval must be one of train, demo, plan, ppl_eval, prepare, sampl"),
    (TRAIN, ["algo.name=foo"], "algo.name=foo must be one of bamdlm, "),
    (TRAIN, ["trainer.precision=fp8"], "trainer.precision=fp8 must be one of 32-true"),
    (TRAIN, ["trainer.accelerator=tpu"], "trainer.accelerator=tpu must be one of auto, gpu, cpu"),
    (TRAIN, ["model.attn_backend=flash"], "Did you mean flash_attn?"),
    (TRAIN, ["noise.type=linear"], "noise.type=linear must be one of loglinear"),
    (TRAIN, ["seed=-1"], "seed=-1 must be from 0 to 4294967295"),
    (TRAIN, ["block_size=0"], "block_size=0 must be at least 1"),
    (TRAIN, ["model.n_heads=-2"], "model.n_heads=-2 must be at least 1"),
    (TRAIN, ["model.dropout=1"], "model.dropout=1.0 must be in [0, 1)"),
    (TRAIN, ["training.ema=1"], "training.ema=1.0 must be in [0, 1)"),
    (TRAIN, ["optim.lr=0"], "optim.lr=0.0 must be above 0"),
    (TRAIN, ["optim.lr=nan"], "optim.lr=nan must be above 0"),
    (TRAIN, ["optim.weight_decay=-1"], "optim.weight_decay=-1.0 must be at least 0"),
    (TRAIN, ["trainer.max_steps=0"], "trainer.max_steps=0 must be at least 1"),
    (TRAIN, ["trainer.devices=0"], "trainer.devices=0 must be at least 1"),
    (TRAIN, ["trainer.limit_val_batches=1.5"], "trainer.limit_val_batches=1.5 must be a number of"),
    (TRAIN, ["trainer.val_check_interval=0.5"], "the training data are an endless stream"),
    (
        PPL,
        ["trainer.limit_val_batches=0"],
        "trainer.limit_val_batches=0 leaves nothing to evaluate",
    ),
    (TRAIN, ["trainer.max_time=8h"], "trainer.max_time=8h must be DD:HH:MM:SS"),
    (
        TRAIN,
        ["callbacks.checkpoint_monitor.monitor=val/loss"],
        "callbacks.checkpoint_monitor.monitor=val/loss must be one of val/nll, val/bpd, val/ppl",
    ),
    (TRAIN, ["training.sampling_eps=1"], "training.sampling_eps=1.0 must be in (0, 1)"),
    (
        TRAIN,
        ["callbacks.checkpoint_monitor.mode=max"],
        "callbacks.checkpoint_monitor.mode=max would keep the worst checkpoint",
    ),
    (TRAIN, ["training.sampling_eps_max=1.2"], "training.sampling_eps_max=1.2 must be in (0, 1]"),
    (TRAIN, ["algo.T=-1"], "algo.T=-1 must be at least 0"),
    (TRAIN, [f"{CLIP}=[0.5,1.5]"], f"{CLIP}=[0.5, 1.5] must be a list of numbers in (0, 1]"),
    (TRAIN, [f"{CLIP}=[0]"], f"{CLIP}=[0.0] must be a list of numbers in (0, 1]"),
    (SAMPLE, ["sampling.nucleus_p=0"], "sampling.nucleus_p=0.0 must be in (0, 1]"),
    (SAMPLE, ["sampling.threshold=0"], "sampling.threshold=0.0 must be in (0, 1]"),
    (SAMPLE, ["sampling.remask_eta=2"], "sampling.remask_eta=2.0 must be in [0, 1]"),
    (SAMPLE, ["sampling.k=0"], "sampling.k=0 must be at least 1"),
    (SAMPLE, ["sampling.steps=fast"], "sampling.steps=fast must be one of first_hitting"),
    (SAMPLE, ["sampling.confidence=max"], "sampling.confidence=max must be one of probability"),
    (SAMPLE, ["sampling.dtype=bf16"], "sampling.dtype=bf16 must be one of float32, float64"),
    (SAMPLE, ["sampling.num_sample_batches=0"], "sampling.num_sample_batches=0 must be at least 1"),
    # network and algorithm
    (TRAIN, ["block_size=12"], "block_size=12 does not divide model.length=1024"),
    (
        TRAIN,
        ["model.hidden_size=100"],
        "model.hidden_size=100 is not a multiple of model.n_heads=12",
    ),
    (TRAIN, ["model.hidden_size=12"], "model.hidden_size=12 / model.n_heads=12 is odd"),
    (TRAIN, ["model.length=2"], "model.length=2 leaves no room between BOS and EOS"),
    (TRAIN, ["algo=mdlm", *BLOCKS], "block_size=4: algo=mdlm is one block of model.length=1024"),
    (TRAIN, ["algo=sedd", *BLOCKS], "block_size=4: algo=sedd is one block"),
    (TRAIN, ["algo.parameterization=sedd"], "algo.parameterization=sedd does not fit algo=bamdlm"),
    (TRAIN, ["algo=sedd", "algo.sampler=semi_ar"], "algo.sampler=semi_ar does not fit algo=sedd"),
    (
        TRAIN,
        [*BLOCKS, "algo.time_conditioning=True"],
        "algo.time_conditioning=True: algo=bamdlm does not",
    ),
    (
        TRAIN,
        ["algo=mdlm", "algo.time_conditioning=True"],
        "algo.time_conditioning=True: algo=mdlm does not",
    ),
    (TRAIN, [*BLOCKS, "algo.cross_attn=False"], "algo.cross_attn=False: algo=bamdlm with"),
    (TRAIN, ["algo=mdlm", "algo.cross_attn=True"], "algo.cross_attn=True does not fit algo=mdlm"),
    (TRAIN, ["noise=log", "algo.mdlm_loss_scale=True"], "is defined for noise=loglinear, not log"),
    # clipping
    (TRAIN, ["algo=mdlm", f"{CLIP}=[.5]"], f"{CLIP}=[0.5] needs algo.var_min=True"),
    (TRAIN, ["algo.var_min=False", f"{CLIP}=[.5]"], f"{CLIP}=[0.5] needs algo.var_min=True"),
    (TRAIN, ["algo=mdlm", "algo.var_min=True"], "algo.var_min=True does not fit algo=mdlm"),
    (
        TRAIN,
        ["training.sampling_eps_min=.8", "training.sampling_eps_max=.3"],
        "training.sampling_eps_min=0.8 is above training.sampling_eps_max=0.3",
    ),
    (
        TRAIN,
        [*BLOCKS, "training.resample=True", "training.sampling_eps_max=.2"],
        "training.resample=True: no multiple of 1/4 lies in [0.001, 0.2]",
    ),
    (
        TRAIN,
        [*BLOCKS, "training.resample=True", f"{CLIP}=[.1]"],
        f"{CLIP}: 0.1 is narrower than 1/4",
    ),
    # noise by counts
    (TRAIN, ["training.counts=[2,3]"], "training.counts=[2, 3] needs training.noise=counts"),
    (TRAIN, ["training.count_law=learnt"], "training.count_law=learnt needs training.noise=counts"),
    (TRAIN, [COUNTS, "algo=sedd"], "training.noise=counts does not fit algo=sedd, only bamdlm"),
    (TRAIN, [COUNTS, "training.counts=[0,3]"], "training.counts=[0, 3] must be two numbers"),
    (TRAIN, [COUNTS, "training.counts=[3,2]"], "training.counts=[3, 2] must be two numbers"),
    (TRAIN, [COUNTS, "training.counts=3"], "training.counts=3 must be a list like [2,3] or null"),
    (
        TRAIN,
        [*BLOCKS, COUNTS, "training.counts=[2,5]"],
        "training.counts=[2, 5] is more than the 4 tokens of a block",
    ),
    (
        TRAIN,
        [*BLOCKS, COUNTS, "training.resample=True"],
        "training.resample=True has no meaning with training.noise=counts",
    ),
    (
        TRAIN,
        [*BLOCKS, *LEARNT, "training.counts=[2,3]"],
        "training.count_law=learnt draws all counts: leave training.counts=[2, 3] out",
    ),
    (
        TRAIN,
        [*BLOCKS, *LEARNT, f"{CLIP}=[.5]"],
        f"training.count_law=learnt does not go with {CLIP}=[0.5]",
    ),
    (TRAIN, ["block_size=1", *LEARNT], "training.count_law=learnt: a block of one token has"),
    (TRAIN, ["block_size=1", COUNTS, f"{CLIP}=[.5]"], f"{CLIP}=[0.5]: a block of one token has"),
    (
        TRAIN,
        [*BLOCKS, *LEARNT, "eval.likelihood=nelbo"],
        "training.count_law=learnt with training.noise=counts is found by the validation's counts",
    ),
    (
        TRAIN,
        [*BLOCKS, COUNTS, f"{CLIP}=[.5]", "eval.likelihood=nelbo"],
        f"{CLIP}=[0.5] with training.noise=counts is found by the validation's counts",
    ),
    (TRAIN, ["training.views=3"], "training.views=3 must be 1 or 2"),
    (TRAIN, [*BLOCKS, "training.views=2"], "training.views=2 needs training.noise=counts"),
    (TRAIN, [COUNTS, "algo=mdlm", "training.views=2"], "training.views=2 share the clean half"),
    (
        TRAIN,
        [COUNTS, "block_size=1", "training.views=2"],
        "training.views=2: with block_size=1 one of them would always be empty",
    ),
    (
        TRAIN,
        [*BLOCKS, *LEARNT, "training.views=2"],
        "training.views=2 have a law of their own, without training.count_law=learnt",
    ),
    (
        TRAIN,
        [*BLOCKS, COUNTS, f"{CLIP}=[.5]", "training.views=2"],
        f"training.views=2 have a law of their own, without {CLIP}=[0.5]",
    ),
    # several block sizes
    (
        TRAIN,
        ["training.block_sizes={4: 1, 6: 1}", "block_size=4"],
        "training.block_sizes={4: 0.5, 6: 0.5}: 6 does not divide model.length=1024",
    ),
    (TRAIN, ["training.block_sizes={4: 0}"], "training.block_sizes={4: 0.0} must be sizes of"),
    (TRAIN, ["training.block_sizes={4: -1, 8: 3}"], "training.block_sizes={4: -1.0, 8: 3.0} must"),
    (TRAIN, ["training.block_sizes={4: nan}"], "training.block_sizes={4: nan} must be sizes of"),
    (TRAIN, ["training.block_sizes={0: 1}"], "training.block_sizes={0: 1.0} must be sizes of"),
    (TRAIN, ["training.block_sizes={}"], "training.block_sizes={} must be sizes of"),
    (
        TRAIN,
        ["training.block_sizes=[1,4]"],
        "training.block_sizes=[1, 4] must be weights by size, like {4: 1, 16: 3}, or null",
    ),
    (TRAIN, ["training.block_sizes={a: 1}"], "training.block_sizes={'a': 1} must be weights by"),
    (
        TRAIN,
        [SIZES, "block_size=8"],
        "block_size=8 is that of validation, and training.block_sizes={4: 0.25, 16: 0.75} does not",
    ),
    (
        TRAIN,
        [SIZES, "algo=mdlm"],
        "training.block_sizes={4: 0.25, 16: 0.75} does not fit algo=mdlm, only bamdlm",
    ),
    (TRAIN, [SIZES, "algo=ar"], "does not fit algo=ar, only bamdlm"),
    (TRAIN, [SIZES, "algo=sedd"], "does not fit algo=sedd, only bamdlm"),
    *(
        (TRAIN, [SIZES, "block_size=4", *words], f"does not go with {other}, which is of one block")
        for other, words in {
            "training.count_law=learnt": LEARNT,
            "training.counts=[2, 3]": [COUNTS, "training.counts=[2,3]"],
            "training.views=2": [COUNTS, "training.views=2"],
            "training.resample=True": ["training.resample=True"],
            f"{CLIP}=[0.5]": [f"{CLIP}=[.5]"],
        }.items()
    ),
    (
        TRAIN,
        ["training.block_sizes={4: 1, 1024: 1}", "algo.cross_attn=False"],
        "algo.cross_attn=False: algo=bamdlm with",
    ),
    (
        PPL,
        ["eval.block_sizes={4: 1, 6: 1}"],
        "eval.block_sizes={4: 0.5, 6: 0.5}: 6 does not divide model.length=1024",
    ),
    (PPL, ["algo=mdlm", "eval.block_sizes={4: 1}"], "eval.block_sizes={4: 1.0} does not fit algo="),
    (PPL, ["eval.block_sizes={4: 0}"], "eval.block_sizes={4: 0.0} must be sizes of blocks"),
    # blocks that grow
    (TRAIN, ["training.block_schedule={1: 4}"], "training.block_schedule={1: 4} must be sizes of"),
    (TRAIN, ["training.block_schedule={0: 0}"], "training.block_schedule={0: 0} must be sizes of"),
    (TRAIN, ["training.block_schedule={}"], "training.block_schedule={} must be sizes of blocks"),
    (
        TRAIN,
        ["training.block_schedule=[[0,1]]"],
        "training.block_schedule=[[0, 1]] must be sizes by step, like {0: 1, 500: 4}, or null",
    ),
    (
        TRAIN,
        ["training.block_schedule={0: 4, 9: 6}", "block_size=4"],
        "training.block_schedule={0: 4, 9: 6}: 6 does not divide model.length=1024",
    ),
    (
        TRAIN,
        [GROWN, "block_size=8"],
        "block_size=8 is that of validation, and training.block_schedule={0: 4, 9: 16} does not",
    ),
    (TRAIN, [GROWN, "algo=mdlm"], "training.block_schedule={0: 4, 9: 16} does not fit algo=mdlm"),
    (TRAIN, [GROWN, SIZES, "block_size=4"], "does not go with training.block_sizes={4: 0.25"),
    (
        TRAIN,
        [GROWN, "block_size=4", COUNTS, "training.views=2"],
        "does not go with training.views=2, which is of one block size",
    ),
    # adapting
    (TRAIN, ["adapt.clean=all"], "adapt.clean=all must be one of block, causal"),
    (TRAIN, ["adapt.label=shift"], "adapt.label=shift must be one of same, next"),
    (TRAIN, ["adapt.ar_loss=-1"], "adapt.ar_loss=-1.0 must be at least 0"),
    (TRAIN, [*BLOCKS, "adapt.ar_loss=.5"], "adapt.ar_loss=0.5 needs adapt.clean=causal: with"),
    (TRAIN, ["algo=mdlm", "adapt.clean=causal"], "adapt.clean=causal does not fit algo=mdlm, only"),
    (TRAIN, ["algo=ar", "adapt.label=next"], "adapt.label=next does not fit algo=ar, only bamdlm"),
    (
        TRAIN,
        [*BLOCKS, "adapt.label=next", "algo.ignore_bos=False"],
        "adapt.label=next predicts a token at the one before it, and the first of a row has none",
    ),
    (
        SAMPLE,
        [*BLOCKS, "adapt.label=next", "sampling.context_size=4"],
        "sampling.context_size=4: with adapt.label=next a block sees the one before it, so it must",
    ),
    # optimizer
    (TRAIN, ["optim=sgd"], "optim=sgd does not exist. Choices: adamw, muon"),
    (
        TRAIN,
        ["optim=muon", "optim.momentum=null"],
        "optim.momentum=null: optim=muon needs a number",
    ),
    (TRAIN, ["optim=muon", "optim.momentum=1"], "optim.momentum=1.0 must be in [0, 1)"),
    (
        TRAIN,
        ["optim=muon", "strategy=fsdp", "trainer.devices=2"],
        "optim=muon works on whole matrices, which strategy=fsdp shards; use strategy=ddp",
    ),
    # batches and machine
    (TRAIN, ["loader.batch_size=7"], "loader.global_batch_size=512 is not a multiple of 7"),
    (
        TRAIN,
        ["loader.global_batch_size=3", "trainer.devices=2"],
        "loader.global_batch_size=3 is not a multiple of 4: loader.batch_size=2 on 2 devices",
    ),
    (
        TRAIN,
        ["loader.batch_size=8", "trainer.accumulate_grad_batches=2"],
        "trainer.accumulate_grad_batches=2 with loader.batch_size=8 on 1 device makes 16, not",
    ),
    (TRAIN, ["trainer.accelerator=gpu"], "trainer.accelerator=gpu: torch sees no GPU here"),
    (TRAIN, ["trainer.precision=16"], "trainer.precision=16-mixed needs a GPU"),
    (TRAIN, ["strategy=fsdp"], "strategy=fsdp has nothing to share out"),
    (
        TRAIN,
        ["strategy=fsdp", "trainer.devices=4", "strategy.replicate=3"],
        "strategy.replicate=3 does not divide the 4 devices",
    ),
    (
        TRAIN,
        ["strategy=fsdp", "trainer.devices=2", "strategy.replicate=2"],
        "strategy.replicate=2 leaves one device to a group, and nothing to share out",
    ),
    (TRAIN, ["strategy.replicate=0"], "strategy.replicate=0 must be at least 1"),
    (TRAIN, ["model.attn_backend=flex"], "model.attn_backend=flex cannot train on a CPU"),
    (
        PPL,
        ["algo=ar", "model.attn_backend=flash_attn"],
        "model.attn_backend=flash_attn needs a GPU",
    ),
    # schedules
    (
        TRAIN,
        [
            "lr_scheduler=cosine_decay_warmup",
            "lr_scheduler.num_warmup_steps=10",
            "trainer.max_steps=9",
        ],
        "lr_scheduler.num_warmup_steps=10 must be below trainer.max_steps=9",
    ),
    (
        TRAIN,
        ["lr_scheduler=cosine_decay_warmup", "lr_scheduler.lr_min=1"],
        "lr_scheduler.lr_min=1.0 must be at most optim.lr=0.0003",
    ),
    # files
    (
        TRAIN,
        ["training.from_pretrained=no.ckpt"],
        "training.from_pretrained=no.ckpt does not exist",
    ),
    (TRAIN, ["training.from_pretrained="], "training.from_pretrained= does not exist"),
    (
        TRAIN,
        ["algo.backbone=hf_dit"],
        "training.from_pretrained=None: algo.backbone=hf_dit needs an",
    ),
    (
        TRAIN,
        ["checkpointing.resume_ckpt_path=a.ckpt"],
        "checkpointing.resume_ckpt_path=a.ckpt does not",
    ),
    (TRAIN, ["checkpointing.save_dir=text.txt"], "save_dir=text.txt: text.txt is a file"),
    (TRAIN, ["checkpointing.save_dir=text.txt/a/b"], "save_dir=text.txt/a/b: text.txt is a file"),
    (PPL, ["checkpointing.save_dir=/proc/a"], "save_dir=/proc/a: nothing can be written there"),
    (SAMPLE, ["sampling.logdir=text.txt/a.csv"], "logdir=text.txt/a.csv: text.txt is a file"),
    (TRAIN, ["data.cache_dir=text.txt"], "data.cache_dir=text.txt is a file"),
    (PPL, ["eval.checkpoint_path=null"], "eval.checkpoint_path is not set: mode=ppl_eval needs"),
    (PPL, ["eval.checkpoint_path=a/b.ckpt"], "eval.checkpoint_path=a/b.ckpt does not exist"),
    (PPL, ["eval.checkpoint_path=./model"], "eval.checkpoint_path=./model does not exist"),
    (
        PPL,
        ["algo.backbone=hf_dit", "eval.checkpoint_path=weights.ckpt"],
        "eval.checkpoint_path=weights.ckpt: algo.backbone=hf_dit needs an exported folder",
    ),
    (
        PPL,
        ["algo.backbone=hf_dit", "eval.checkpoint_path=null"],
        "eval.checkpoint_path is not set: algo",
    ),
    (
        TRAIN,
        ["data=files", "data.train=text.txt"],
        "data.valid is not set: data=files needs a file",
    ),
    (
        TRAIN,
        ["data.train=shakespere"],
        "is neither a known corpus nor a file. Did you mean shakesp",
    ),
    (TRAIN, ["data.train=no.txt"], "data.train=no.txt does not exist"),
    (
        TRAIN,
        ["data.train=weights.ckpt"],
        "data.train: weights.ckpt must be a file of kind .txt, .jsonl",
    ),
    (TRAIN, ["data.valid=empty.txt"], "data.valid: empty.txt is empty"),
    (TRAIN, ["data.valid=folder"], "data.valid=folder holds no file of kind .txt"),
    (
        TRAIN,
        ["data.train=text8-crop", "data.streaming=True"],
        "data.streaming=True does not go with data.train=text8-crop",
    ),
    (
        TRAIN,
        ["data.tokenizer_name_or_path=./no"],
        "data.tokenizer_name_or_path=./no does not exist",
    ),
    # sampling
    (
        SAMPLE,
        ["algo=mdlm", "sampling.kv_cache=True"],
        "sampling.kv_cache=True is exact for bamdlm and ar",
    ),
    (SAMPLE, ["algo=sedd", "algo.T=9", "sampling.kv_cache=True"], "only, not for algo=sedd"),
    (SAMPLE, [*BLOCKS, "sampling.context_size=6"], "sampling.context_size=6 is not a multiple of"),
    (
        SAMPLE,
        ["algo=mdlm", "block_size=1"],
        "block_size=1: the windows of algo=mdlm need at least 2",
    ),
    (
        SAMPLE,
        ["sampling.first_hitting=False"],
        "algo.T=0: sampling.steps=ancestral takes algo.T steps",
    ),
    (SAMPLE, ["sampling.steps=remask"], "algo.T=0: sampling.steps=remask takes algo.T steps"),
    (SAMPLE, ["algo=sedd"], "algo.T=0: algo=sedd takes algo.T steps"),
    (
        SAMPLE,
        ["algo=ar", "sampling.steps=threshold"],
        "sampling.steps=threshold does not fit algo=ar",
    ),
    (
        SAMPLE,
        ["sampling.first_hitting=False", "sampling.steps=first_hitting"],
        "sampling.first_hitting=False contradicts sampling.steps=first_hitting",
    ),
    (
        SAMPLE,
        [*BLOCKS, "sampling.steps=confidence", "sampling.k=5"],
        "sampling.k=5 is more than the block_size=4 of a block",
    ),
    (
        SAMPLE,
        ["sampling.var_length=True", "sampling.reject_low_entropy=True"],
        "sampling.reject_low_entropy=True draws again what sampling.var_length=True cuts",
    ),
    (SAMPLE, ["sampling.prompts=no.txt"], "sampling.prompts=no.txt does not exist"),
    (SAMPLE, ["sampling.prompts=empty.txt"], "sampling.prompts=empty.txt is empty"),
    (SAMPLE, ["sampling.prompts=weights.ckpt"], "sampling.prompts=weights.ckpt must be a .txt or"),
    (SAMPLE, ["sampling.prompts=text.txt", "sampling.prompt=a"], "are both set: choose one"),
    (SAMPLE, ["sampling.infill=True"], "sampling.infill=True needs sampling.prompt or"),
    (SAMPLE, ["algo=ar", "sampling.prompt=a", "sampling.infill=True"], "not by algo=ar"),
    (
        SAMPLE,
        ["sampling.prompt=a", "sampling.infill=True", "sampling.var_length=True"],
        "sampling.var_length=True has no place beside sampling.infill=True",
    ),
    (
        SAMPLE,
        ["sampling.prompt=a", "sampling.infill=True", "sampling.reject_low_entropy=True"],
        "sampling.reject_low_entropy=True has no place beside sampling.infill=True",
    ),
    (
        SAMPLE,
        ["sampling.trajectory=t.gif"],
        "sampling.trajectory=t.gif must be the name of an .html",
    ),
    (SAMPLE, ["eval.gen_ppl_eval_model_name_or_path=./judge"], "_or_path=./judge does not exist"),
]
WRONG += [
    (TRAIN, [f"{key}=1"], f"{key} had no effect in the original code") for key in sorted(DEAD)
]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A launch folder with a few files, on a machine without a GPU."""
    for module in ("settings.defaults", "settings.rules.machine"):
        monkeypatch.setattr(f"{module}.visible_gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "weights.ckpt").touch()
    (tmp_path / "folder").mkdir()
    return tmp_path


def refused(arguments, capsys) -> list[str]:
    """The lines of stderr about a command line that must end with exit code 2 and write nothing."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        cli.configure(arguments)
    assert stopped.value.code == 2
    assert sorted(Path.cwd().rglob("*")) == before
    said = capsys.readouterr()
    assert said.out == ""
    return [line for line in said.err.splitlines() if not line.startswith("note: ")]


@pytest.mark.parametrize(
    ("context", "wrong", "message"), WRONG, ids=[" ".join(w[1]) for w in WRONG]
)
def test_wrong_input_has_its_one_message(context, wrong, message, capsys):
    head, *problems = refused([*context, *wrong], capsys)
    assert head == "this run cannot start:"
    assert len(problems) == 1
    assert problems[0].startswith("  - ")
    assert message in problems[0]


def test_processes_of_torchrun_must_be_the_devices(capsys, monkeypatch):
    """Otherwise each of them would write every text."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (_, problem) = refused([*SAMPLE, "trainer.devices=1"], capsys)
    assert "trainer.devices=1: torchrun started 2 processes here" in problem
    assert cli.configure(SAMPLE).trainer.devices == 2


def test_all_problems_are_listed_at_once(capsys):
    lines = refused(
        [
            *("modle.length=4", "seed=x", "data=shakespear", "sampling.nucleus_p=1.5"),
            *("block_size=12", "training.from_pretrained=no.ckpt", "loader.batch_size=7"),
        ],
        capsys,
    )
    assert len(lines) == 8
    for word in ("modle", "seed=x", "shakespear", "nucleus_p", "block_size", "no.ckpt", "=512 is"):
        assert any(word in line for line in lines), word


def test_a_gpu_machine_has_limits_too(monkeypatch, capsys):
    for module in ("settings.defaults", "settings.rules.machine"):
        monkeypatch.setattr(f"{module}.visible_gpus", lambda: 2)
        monkeypatch.setattr(f"{module}.has_package", lambda name: False)
    for wrong, message in (
        (["trainer.devices=4"], "trainer.devices=4: this machine has 2"),
        (["strategy=fsdp", "trainer.devices=1"], "strategy=fsdp has nothing to share out"),
        (["model.attn_backend=flash_attn", "algo=ar"], "the package flash_attn is not installed"),
        (["model.attn_backend=flex", "model.n_heads=64"], "flex needs heads of at least 16"),
        (
            ["model.attn_backend=flex", "algo.backbone=llama", "model.head_dim=8"],
            "flex needs heads of at least 16 on a GPU, but model.head_dim is 8",
        ),
    ):
        assert message in " ".join(refused([*TRAIN, *wrong], capsys))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (BLOCKS, "cannot apply the block mask of algo=bamdlm"),
        (["algo=ar", "trainer.precision=32"], "flash_attn needs trainer.precision=bf16"),
        (["algo=ar", "data.wrap=False"], "cannot hide padding (data.wrap=False)"),
    ],
)
def test_flash_attention_is_refused_where_it_cannot_serve(monkeypatch, capsys, wrong, message):
    for module in ("settings.defaults", "settings.rules.machine"):
        monkeypatch.setattr(f"{module}.visible_gpus", lambda: 1)
        monkeypatch.setattr(f"{module}.has_package", lambda name: True)
    (_, problem) = refused([*TRAIN, "model.attn_backend=flash_attn", *wrong], capsys)
    assert message in problem


# ---- warnings ---------------------------------------------------------------------------------

HARMLESS = [
    (TRAIN, ["algo=ar", "block_size=4"], "block_size=4 has no effect: ar has blocks of 1"),
    (TRAIN, ["algo=ar", "noise=cosine"], "noise has no effect: algo=ar has no noise"),
    (TRAIN, ["algo=ar", COUNTS], "training.noise has no effect: algo=ar has no noise"),
    (TRAIN, ["algo=ar", "training.resample=True"], "training.resample has no effect"),
    (TRAIN, ["model.adaln=True"], "model.adaln=True has no effect: algo=bamdlm always modulates"),
    (TRAIN, ["algo.fix_clipping=True"], "algo.fix_clipping=True has no effect"),
    (TRAIN, ["strategy.replicate=2"], "strategy.replicate=2 has no effect: strategy=ddp has"),
    (PPL, ["strategy.replicate=2"], "strategy.replicate=2 has no effect: mode=ppl_eval trains"),
    (TRAIN, ["training.eval_nll=False"], "training.eval_nll=False has no effect"),
    (TRAIN, ["lr_scheduler.lr_min=1e-5"], "lr_scheduler.lr_min has no effect"),
    (
        TRAIN,
        ["lr_scheduler=constant", "lr_scheduler.num_warmup_steps=5"],
        "num_warmup_steps has no",
    ),
    (TRAIN, ["trainer.max_steps=100"], "optim.lr is never reached"),
    (
        TRAIN,
        ["training.block_schedule={0: 4, 3000: 8, 9000: 16}", *BLOCKS, "trainer.max_steps=3000"],
        "training.block_schedule: blocks of 8 begin at step 3000, which is not",
    ),
    (
        TRAIN,
        ["data.wrap=False", "data.insert_train_eos=False"],
        "data.insert_train_eos=False has no",
    ),
    (TRAIN, ["data.stream_by=files"], "data.stream_by=files has no effect without data.streaming"),
    (
        TRAIN,
        ["data.train_revision=main"],
        "data.train_revision has no effect: shakespeare does not",
    ),
    (
        ["data=ag_news", "wandb=null"],
        ["data.source=.", "data.train_revision=main"],
        "data.train_revision has no effect: data.source=. is read",
    ),
    (PPL, ["training.eval_nll=False"], "training.eval_nll=False has no effect"),
    (PPL, ["training.sampling_eps_min=.3"], "training.sampling_eps_min has no effect: mode=ppl"),
    (TRAIN, ["optim.momentum=.9"], "optim.momentum has no effect: optim=adamw has beta1"),
    (PPL, ["training.noise=counts"], "training.noise has no effect: mode=ppl_eval draws from"),
    (TRAIN, ["eval.block_sizes={4: 1}"], "eval.block_sizes has no effect: mode=train does not"),
    (
        PPL,
        ["eval.block_sizes={4: 1}", "block_size=4"],
        "block_size has no effect: eval.block_sizes={4: 1.0} has the sizes",
    ),
    (PPL, [SIZES], "training.block_sizes has no effect: mode=ppl_eval measures at block_size"),
    (PPL, [GROWN], "training.block_schedule has no effect: mode=ppl_eval measures at block_size"),
    (
        PPL,
        ["adapt.clean=causal", "adapt.ar_loss=1"],
        "adapt.ar_loss has no effect: mode=ppl_eval measures diffusion alone",
    ),
    (
        PPL,
        [SIZES, "eval.block_sizes={4: 1}"],
        "training.block_sizes has no effect: mode=ppl_eval measures at eval.block_sizes",
    ),
    (
        TRAIN,
        [COUNTS, "training.sampling_eps_min=.3"],
        "training.sampling_eps_min has no effect: training.noise=counts draws no times",
    ),
    (
        TRAIN,
        [COUNTS, "noise=cosine"],
        "noise.type has no effect: training.noise=counts draws no times",
    ),
    (PPL, ["training.from_pretrained=org/x"], "training.from_pretrained=org/x has no effect"),
    (
        SAMPLE,
        ["algo=ar", "sampling.first_hitting=False"],
        "sampling.first_hitting=False has no effect",
    ),
    (SAMPLE, ["algo=ar", "algo.T=5"], "algo.T=5 has no effect: ar takes one step per token"),
    (
        SAMPLE,
        ["algo.T=5"],
        "algo.T=5 has no effect: steps=first_hitting ends when nothing is masked",
    ),
    (SAMPLE, ["algo=mdlm", "sampling.context_size=64"], "sampling.context_size has no effect"),
    (SAMPLE, ["sampling.k=2"], "sampling.k has no effect without sampling.steps=confidence"),
    (
        SAMPLE,
        ["sampling.entropy_bound=1"],
        "has no effect without sampling.steps=entropy_bounded",
    ),
    (SAMPLE, ["sampling.temperature=0", "sampling.top_k=9"], "sampling.top_k has no effect: "),
    (SAMPLE, ["sampling.threshold=.5"], "has no effect without sampling.steps=threshold"),
]


@pytest.mark.parametrize(
    ("context", "words", "message"), HARMLESS, ids=[" ".join(w[1]) for w in HARMLESS]
)
def test_option_without_effect_gets_one_line(context, words, message, capsys):
    cli.configure([*context, *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ")
    assert message in line


def test_an_older_torch_has_no_muon(monkeypatch, capsys):
    monkeypatch.setattr("settings.rules.training.torch_version", lambda: (2, 8))
    said = "\n".join(refused([*TRAIN, "optim=muon"], capsys))
    assert "optim=muon needs torch 2.9 or newer, here is 2.8; use optim=adamw" in said
    cli.configure(TRAIN)


@pytest.mark.parametrize("context", [TRAIN, PPL, SAMPLE])
def test_defaults_are_silent(context, capsys):
    cli.configure(context)
    assert capsys.readouterr().err == ""


def test_only_the_first_process_of_a_job_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert refused(["mode=eval"], capsys) == []


# ---- the command itself -----------------------------------------------------------------------


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_shows_modes_groups_commands_and_every_setting(word, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.configure(["mode=train", word])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "mode=ppl_eval",
        "  mode=plan",
        "experiment=quickstart",
        "lr_scheduler=",
        "wikitext103",
        "optim.lr=0.0003",
    ):
        assert part in text


def test_the_commands_of_the_help_can_be_run(capsys, folder):
    from settings.help import EXAMPLES

    for name in ("mine.txt", "held_out.txt"):
        (folder / name).write_text("text")
    lines = EXAMPLES.replace("\\\n", " ").splitlines()
    shown = [
        line.partition("#")[0].split()[2:] for line in lines if line.startswith("  python main")
    ]
    for arguments in shown[1:]:
        if "mode=" in " ".join(arguments) and "checkpoint_path" not in " ".join(arguments):
            arguments = [*arguments, "eval.checkpoint_path=org/model"]
        if "--cfg" not in arguments:
            jobs = expand(arguments).jobs if "-m" in arguments else []
            for words in [job.words for job in jobs] or [arguments]:
                cli.configure(words)


def test_cfg_shows_the_composed_settings(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.configure(["--cfg", "job", "algo=mdlm", "seed=7"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "seed: 7" in text
    assert "name: mdlm" in text


def command(*arguments):
    return subprocess.run(
        [sys.executable, str(MAIN), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [["block_size=12", "sampling.nucleus_p=1.5"], ["modle=small"], ["a b c"]],
)
def test_main_ends_with_2_for_a_wrong_command(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(arguments)
    assert capsys.readouterr().err.startswith("this run cannot start:\n  - ")


def test_wrong_command_ends_at_once_without_a_traceback(folder):
    before = sorted(folder.rglob("*"))
    done = command("mode=ppl_eval", "data=shakespeare")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("this run cannot start:\n  - ")
    assert "Traceback" not in done.stderr
    assert sorted(folder.rglob("*")) == before


def test_help_is_a_command():
    done = command("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "mode=sample_eval" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"]])
def test_a_reader_that_goes_away_is_no_error(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, MAIN, *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
