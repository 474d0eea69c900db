"""Declare the keys of a run's data: its sources, how their rows are read, and which tokens are trained.

Left out: all other sections (schema.py), and reading what the keys name (data/preparation).
"""

import codecs
import datetime
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qlora_trainer.config.row_template import parts

DataFormat = Literal["auto", "chat", "sharegpt", "alpaca", "dolly", "prompt_completion", "question_answer", "text"]


def _encoding_is_known(value: str | None) -> str | None:
    """Refuse an encoding that Python does not know, or that is none of text files."""
    try:
        "".encode(value or "utf-8")
        if codecs.lookup(value or "utf-8").name in ("idna", "punycode"):  # for domain names, not for files
            raise LookupError
    except (LookupError, UnicodeError, ValueError):
        raise ValueError(
            "is no text encoding that Python knows; such are utf-8, utf-16, cp1252, latin-1, gb18030"
        ) from None
    return value


def _texts_can_be_cut(template: dict[str, str]) -> dict[str, str]:
    for text in template.values():
        parts(text)
    return template


RowTemplate = Annotated[dict[str, str], AfterValidator(_texts_can_be_cut)]
Encoding = Annotated[str | None, AfterValidator(_encoding_is_known)]
Scalar = bool | int | float | str
RenderedText = Literal["auto", "turns", "text"]
RoleName = Literal["system", "user", "assistant", "tool"]


def _types(annotation: Any) -> set[Any]:
    """Return the types that an annotation names, those in unions and lists too."""
    return {annotation}.union(*(_types(part) for part in get_args(annotation)))


class Section(BaseModel):
    """Refuse unknown keys, changes after construction, NaN and infinities, in every section of a config."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse for a number what Pydantic would turn into one: true, false, and digits after a zero."""
        taken = _types(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and taken & {int, float} and bool not in taken:
            raise ValueError("should be a number; YAML reads yes, no, on and off as true and false")
        if isinstance(value, str) and int in taken and re.fullmatch(r"\s*[-+]?0\d+\s*", value):
            raise ValueError(f"should be a number in plain digits, such as {int(value)}")
        return value


class SourceFile(Section):
    """Name a file or hub data set, and say how to read it."""

    path: str = Field(
        description="A file (.jsonl, .json, .csv, .tsv, .txt, also .gz, .bz2, .xz, .zst; .parquet, .arrow, .xlsx), a "
        "folder, .zip or .tar of such files of one kind, a pattern such as rows/*.jsonl, or a hub data set's name."
    )
    format: DataFormat = Field("auto", description="How to read its rows; auto: by their columns.")
    columns: dict[str, str] = Field({}, description="As data.columns, for this source.")
    template: RowTemplate = Field({}, description="As data.template, for this source.")
    ignore: list[str] = Field([], description="As data.ignore, for this source.")
    keep: dict[str, Scalar | list[Scalar]] = Field({}, description="As data.keep, for this source.")
    roles: dict[str, RoleName] = Field({}, description="As data.roles, for this source.")
    rendered: RenderedText | None = Field(None, description="As data.rendered, for this source.")
    header: list[str] = Field([], description="As data.header, for this source.")
    encoding: Encoding = Field(None, description="As data.encoding, for this source.")
    rows: str | None = Field(None, description="As data.rows, for this source.")
    split: str = Field("train", description="Which split of a hub data set, or of a saved one; a file has none.")
    subset: str | None = Field(
        None,
        description="Which subset (configuration) of a hub data set that has several, or which sheet of a workbook.",
    )


class Source(SourceFile):
    """Name one data set of several, and its part in an epoch."""

    weight: float | None = Field(
        None,
        ge=1e-9,
        le=1e9,
        description="Its share of an epoch's rows, relative to the other sources' weights. No row is repeated: the "
        "source that runs out first ends the epoch; of the others, each epoch takes different rows.",
    )
    count: int | None = Field(
        None,
        ge=1,
        description="How many of its rows an epoch takes. Rows are repeated if it has fewer; if it has more, each "
        "epoch takes different ones. null: all of them.",
    )

    @model_validator(mode="after")
    def _weight_or_count(self) -> "Source":
        if self.weight is not None and self.count is not None:
            raise ValueError("has a weight and a count; give it only one of them")
        return self


class DataConfig(Section):
    """Configure the rows and which of their tokens are trained."""

    train: str | list[Source] = Field(
        description="A file, folder, archive or pattern, or a hub data set's name; or a list of these, or of sources."
    )
    eval: float | str | SourceFile | list[SourceFile] = Field(
        0.05,
        description="Share of an epoch's rows to keep out of training for evaluation (0: none), taken from each source "
        "in proportion; or a file of eval rows; or a source of them, {path, …}; or a list of these.",
    )
    format: DataFormat = Field(
        "auto", description="How to read the rows of a source without a format; auto: by columns."
    )
    columns: dict[str, str] = Field(
        {},
        description="Where to find each column: {column: path}, such as {prompt: query, completion: answers.0.text}; a "
        "path that ends in ? may be absent. A source's own settings come first, here and down to encoding.",
    )
    template: RowTemplate = Field(
        {},
        description="Columns made from several fields: {column: text with {path} in it}; write {{ and }} for braces.",
    )
    ignore: list[str] = Field(
        [],
        description="Columns, keys of turns such as messages[].mask, and marks inside objects such as meta.label "
        "(notes[].score in a list of them), to leave out. A column whose name has a meaning in other formats or "
        "trainers (label, score, weight, system, …) stops the run if it is neither read nor named here.",
    )
    keep: dict[str, Scalar | list[Scalar]] = Field(
        {},
        description="Which rows to keep: {column: value}, or {column: [values]}, such as {label: true}; the others "
        "are counted as dropped.",
    )
    roles: dict[str, RoleName] = Field(
        {}, description="Roles of speakers whose names are not known, such as {Chatbot: assistant}."
    )
    rendered: RenderedText = Field(
        "auto",
        description="What to do with plain text that a chat template already wrote from a conversation. auto: read it "
        "back into turns if the model's template writes exactly this text, else stop; turns: read it into turns in any "
        "case; text: train on it as plain text.",
    )
    header: list[str] = Field(
        [], description="Names of the columns, in order, for CSV, TSV and Excel files without a header line."
    )
    encoding: Encoding = Field(
        None, description="Encoding of text files, such as utf-16 or cp1252; null: UTF-8. It is never guessed."
    )
    rows: str | None = Field(
        None,
        description="Where to find the rows of JSON files that hold them inside an object: keys joined by dots, such "
        "as data.examples; * is each item of a list, or each value of an object.",
    )
    max_length: int = Field(
        2048,
        ge=8,
        description="Longest row in tokens, virtual ones (adapter.virtual_tokens) counted; also limited by the model's "
        "positions.",
    )
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate",
        description="What to do with a longer row. truncate: cut whole turns from the end of a conversation, or the "
        "end of a completion, and drop the row if nothing to train is left; drop: leave it out; error: stop. Plain "
        "text is split into rows of max_length under all three.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="What to do with a row that cannot be read or rendered. error: stop; skip: leave it out, count it, "
        "and list it in skipped_rows.jsonl of the run directory.",
    )
    max_skipped: float = Field(
        0.1, ge=0.0, le=1.0, description="Largest share of a source's rows to skip; if more are bad, the run stops."
    )
    packing: bool = Field(True, description="Lay rows end to end without padding; attention keeps them apart.")
    train_on: Literal["assistant", "last", "all"] | list[Literal["system", "user", "assistant", "tool"]] = Field(
        "assistant",
        description="Which tokens carry loss: all assistant turns, the last one, all turns of a list of roles such as "
        "[assistant, tool], or every token. A message's own weight, train or learn comes first.",
    )
    template_date: datetime.date | None = Field(
        None,
        description="The date, such as 2026-01-31, that a chat template writes as today's; null: the day the run "
        "starts.",
    )

    @field_validator("train_on")
    @classmethod
    def _roles_are_named(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("is an empty list; use assistant, last, all, or a list of roles such as [assistant, tool]")
        return value

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _names_are_sources(cls, value: object) -> object:
        """Read a plain name in a list as a source."""
        if not isinstance(value, list):
            return value
        return [{"path": item} if isinstance(item, str) else item for item in value]

    @field_validator("eval", mode="before")
    @classmethod
    def _number_is_a_share(cls, value: object) -> object:
        """Read text such as 1e-1, which YAML takes for no number, as a share; a file of that name is ./1e-1."""
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    @field_validator("eval")
    @classmethod
    def _eval_is_a_share_or_path(
        cls, value: float | str | SourceFile | list[SourceFile]
    ) -> float | str | SourceFile | list[SourceFile]:
        if isinstance(value, float) and not 0.0 <= value < 1.0:
            raise ValueError("must be a share from 0 up to (not including) 1, or the path of a file")
        return value

    @field_validator("train")
    @classmethod
    def _all_sources_are_weighted_or_none(cls, value: str | list[Source]) -> str | list[Source]:
        without = [source.path for source in value if isinstance(source, Source) and source.weight is None]
        if without and len(without) < len(value) and not isinstance(value, str):
            raise ValueError(f"some sources have a weight, but not {', '.join(without)}; give one to all, or to none")
        return value
