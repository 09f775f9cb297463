"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from granite_jax.inference.options import Parallel as ParallelName

Format = Literal["txt", "json"]
DtypeName = Literal["float32", "bfloat16"]

Checkpoint = Annotated[
    str, typer.Option(help='"demo", a directory of "granite-jax convert" or Hugging Face, or a hub id')
]
Revision = Annotated[str | None, typer.Option(help="of a hub id: branch, tag or commit", show_default=False)]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(help="default: bfloat16 where the device has it", show_default=False),
]
Task = Annotated[
    Literal["transcribe", "punctuate", "translate"],
    typer.Option(help="raw transcript, transcript with punctuation, or translation"),
]
To = Annotated[str | None, typer.Option(help="target language of a translation, as in fr or French")]
Prompt = Annotated[str | None, typer.Option(help="a prompt of your own, instead of the task's")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="default: 200, or 6 a second of audio", show_default=False)
]
Speculative = Annotated[
    Literal["lossless", "relaxed", "relaxed-accurate", "relaxed-fast", "off"],
    typer.Option(help="the encoder's drafts: same text sooner, or accepted when plausible"),
]
CtcThreshold = Annotated[
    float | None,
    typer.Option(min=0, help="relaxed: largest frame entropy, in nats, of a final draft", show_default=False),
]
VerifyThreshold = Annotated[
    float | None, typer.Option(min=0, help="relaxed: least likelihood of a draft token", show_default=False)
]
Keyword = Annotated[
    list[str] | None, typer.Option(help="a name or term that may be spoken; repeat for more", show_default=False)
]
KeywordsFile = Annotated[
    Path | None, typer.Option(help="keywords, one a line; after a tab, a boost in nats", show_default=False)
]
KeywordBoost = Annotated[
    float | None, typer.Option(min=0, help="nats by which keywords are lifted", show_default=False)
]
KeywordsIn = Annotated[
    Literal["decoder", "prompt", "both"], typer.Option(help="bias decoding, mention them in the prompt, or both")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="rows of a full batch on each device; default by device", show_default=False)
]
Parallel = Annotated[ParallelName, typer.Option(help="how batches are spread over this machine's devices")]
ModelParallel = Annotated[
    int, typer.Option(min=1, help="devices that share a copy of the weights, for models too big for one")
]
