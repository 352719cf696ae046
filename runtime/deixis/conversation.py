"""A conversation about a picture: its text, its ids, and what an answer with phrases and masks says (GLaMM).

Standard library only: runtime, export and training share it. Sections are those of the GLaMM specification.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from deixis.bundle import ConversationSpec

IMAGE, IMAGE_ID = "<image>", -200  # never in the vocabulary: the id says where the picture's features go
IGNORED = -100  # label of a position that no loss looks at
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
REGION = "<bbox>"
MASK = "[SEG]"
PHRASE_START, PHRASE_END = "<p>", "</p>"
BEGIN, END = "<s>", "</s>"
MARKS = (IMAGE, IMAGE_START, IMAGE_END, REGION, MASK, PHRASE_START, PHRASE_END, BEGIN, END)

# The published models were trained with these to the letter (section 5.2).
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
IMAGE_SENTENCE = f"The {IMAGE} provides an overview of the picture."

Encode = Callable[[str], list[int]]  # ids of a text, marks of the vocabulary included, no begin id
Turn = tuple[str, str | None]  # question, answer; None: the answer is still to come

_USER, _ASSISTANT = "USER: ", "ASSISTANT:"
_MARK = re.compile("|".join(re.escape(mark) for mark in MARKS))
# White space beside a mark is lost when text becomes ids (section 5.3), so it is put back by what stands there.
_NO_SPACE_BEFORE = re.compile(r"[.,;:!?%)\]}…]|(?:'(?:s|re|ll|ve|d|m|t)|n't)\b")
_NO_SPACE_BEHIND = ("(", "[", "{")


def render(spec: ConversationSpec, turns: Sequence[Turn], image: bool = True) -> str:
    """Text of a conversation (section 5.2), with the picture as `<im_start><image><im_end>`.

    Args:
        spec: of the manifest.
        turns: question and answer; only the last answer may be None, and the text then ends in "ASSISTANT:".
        image: put the image sentence and a line break before the first question, unless that names `<image>` itself.

    Raises:
        ValueError: no turn, an open answer that is not the last, or `<image>` where it cannot be.
    """
    return _system(spec) + "".join(
        before + ("" if answer is None else f" {answer}{END}") for before, answer in _rounds(spec, turns, image)
    )


def prompt_ids(text: str, encode: Encode, spec: ConversationSpec) -> list[int]:
    """Ids of a rendered conversation (section 5.3): the begin id, then the pieces around `<image>`, which is IMAGE_ID.

    Raises:
        ValueError: `<image>` more than once.
    """
    return [spec.begin_id, *_encode(text, encode)]


def follow_up_ids(spec: ConversationSpec, question: str, encode: Encode) -> list[int]:
    """Ids to append behind a finished answer and its end id, to ask the next question.

    An answer that was cut short needs its end id first. The form is that of training, with one end between turns.

    Raises:
        ValueError: the question names `<image>`.
    """
    return _encode(_follow_up(question), encode)


def label_mask(
    spec: ConversationSpec, turns: Sequence[Turn], encode: Encode, image: bool = True
) -> tuple[list[int], list[int]]:
    """Ids and labels of a whole conversation (section 9.2), of one length.

    Ids are `prompt_ids` of `render`. Labels are the ids of answers and of their ends, IGNORED elsewhere.

    Raises:
        ValueError: an open answer, or as `render` does.
    """
    ids, labels = [spec.begin_id], [IGNORED]
    for number, (before, answer) in enumerate(_rounds(spec, turns, image)):
        if answer is None:
            raise ValueError(f"turn {number + 1} has no answer, so there is nothing to learn from it")
        question = (_system(spec) if number == 0 else "") + before
        whole = [*_encode(f"{question} {answer}", encode), spec.end_id]
        asked = len(_encode(question, encode))
        ids += whole
        labels += [IGNORED] * asked + whole[asked:]
    return ids, labels


def reserved_marks(text: str) -> tuple[str, ...]:
    """Marks in a text, in order. A user's text must not hold any but, where the model takes boxes, `<bbox>`."""
    return tuple(_MARK.findall(text))


def tag_phrases(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """A caption with every phrase as `<p> phrase </p> [SEG]`, as answers are trained (section 9.5).

    Args:
        spans: [start, end) characters of each phrase, in any order; they must not overlap.

    Raises:
        ValueError: spans that are empty, overlap, or leave the text.
    """
    behind = len(text)
    for start, end in sorted(spans, reverse=True):
        if not 0 <= start < end <= behind:
            raise ValueError(f"phrase {start}..{end} is empty, overlaps another or leaves the text")
        text = f"{text[:start]}{PHRASE_START} {text[start:end]} {PHRASE_END} {MASK}{text[end:]}"
        behind = start
    return text


@dataclass(frozen=True)
class PhraseSpan:
    """A phrase of an answer: `text` is [start, end) of the clean text; `mask_index` counts the answer's [SEG]s."""

    text: str
    start: int
    end: int
    mask_index: int | None


@dataclass(frozen=True)
class ParsedAnswer:
    """What an answer says.

    text: without marks, white space made even. phrases: in the order of the text, never overlapping.
    loose_masks: indices of [SEG]s that belong to no phrase. problems: what is wrong with the marks, a short line each.
    """

    text: str
    phrases: tuple[PhraseSpan, ...]
    loose_masks: tuple[int, ...]
    problems: tuple[str, ...]


def parse_answer(text: str) -> ParsedAnswer:
    """Read an answer with marks; any text can be read.

    A phrase takes the [SEG] that follows it before the next phrase begins; a [SEG] inside an open phrase closes it.
    Every [SEG] is taken by one phrase or is loose. A loose one is a problem only where the answer marks phrases.
    White space beside marks does not count: it becomes one space, a line break if it has one, or nothing before
    closing punctuation and behind an opening bracket.
    """
    reading = _Reading()
    position = 0
    for match in _MARK.finditer(text):
        reading.words(text[position : match.start()])
        reading.mark(match.group())
        position = match.end()
    reading.words(text[position:])
    return reading.result()


def parse_answer_ids(ids: Sequence[int], decode: Callable[[list[int]], str], spec: ConversationSpec) -> ParsedAnswer:
    """Read an answer by its ids, as `parse_answer` does, but only ids are marks: a "[SEG]" that is spelled is text.

    Args:
        decode: text of ids between marks.
    """
    marks = {
        IMAGE_ID: IMAGE,
        spec.begin_id: BEGIN,
        spec.end_id: END,
        spec.image_start_id: IMAGE_START,
        spec.image_end_id: IMAGE_END,
        spec.mask_id: MASK,
        spec.phrase_start_id: PHRASE_START,
        spec.phrase_end_id: PHRASE_END,
    }
    if spec.region_id is not None:
        marks[spec.region_id] = REGION
    reading = _Reading()
    stretch: list[int] = []
    for number in map(int, ids):
        if number not in marks:
            stretch.append(number)
            continue
        reading.words(decode(stretch) if stretch else "")
        reading.mark(marks[number])
        stretch = []
    reading.words(decode(stretch) if stretch else "")
    return reading.result()


def clean_answer(text: str) -> str:
    """The published scripts' cleaning of decoded text (section 8): marks stay, "ASSISTANT: " and what precedes it goes.

    Text in which no answer follows comes back whole, as there.
    """
    return text.replace("\n", "").replace("  ", " ").split("ASSISTANT: ")[-1]


def published_gcg(text: str) -> tuple[str, list[str]]:
    """Caption and phrases as the published evaluation takes them from a cleaned answer (section 8)."""
    phrases = [phrase.strip() for phrase in re.findall(r"<p>(.*?)</p>", text)]
    caption = re.sub(r"<.*?>", "", text).replace(MASK, "")
    return " ".join(caption.split()).strip("'").strip(), phrases


def _system(spec: ConversationSpec) -> str:
    return f"{spec.system} "


def _rounds(spec: ConversationSpec, turns: Sequence[Turn], image: bool) -> list[Turn]:
    """Each turn's text up to and including "ASSISTANT:", and its answer."""
    if not turns:
        raise ValueError("a conversation needs a turn")
    rounds: list[Turn] = []
    for number, (question, answer) in enumerate(turns):
        if answer is None and number < len(turns) - 1:
            raise ValueError(f"turn {number + 1} has no answer, yet another turn follows")
        if IMAGE in (answer or ""):
            raise ValueError(f"the answer of turn {number + 1} names {IMAGE}, which only a first question may")
        if number:
            rounds.append((_follow_up(question), answer))
            continue
        if not image and IMAGE in question:
            raise ValueError(f"the question names {IMAGE} in a conversation without a picture")
        if image and IMAGE not in question:
            question = f"{spec.image_sentence}\n{question}"
        rounds.append((_ask(question.replace(IMAGE, IMAGE_START + IMAGE + IMAGE_END)), answer))
    return rounds


def _follow_up(question: str) -> str:
    if IMAGE in question:
        raise ValueError(f"a later question names {IMAGE}; the picture stands in the first one")
    return _ask(question)


def _ask(question: str) -> str:
    return f"{_USER}{question} {_ASSISTANT}"


def _encode(text: str, encode: Encode) -> list[int]:
    before, *behind = text.split(IMAGE)
    if len(behind) > 1:
        raise ValueError(f"{IMAGE} stands {len(behind)} times in the conversation; one picture is possible")
    ids = encode(before)
    for piece in behind:
        ids = [*ids, IMAGE_ID, *encode(piece)]
    return list(ids)


@dataclass
class _Reading:
    """Collects an answer from stretches of words and the marks between them, in turns."""

    text: str = ""
    line_break: bool = False  # between the text so far and the next words
    opened: bool = False  # a phrase is open
    start: int | None = None  # where its words begin
    waiting: bool = False  # the last phrase may still take a [SEG]
    masks: int = 0
    ended: bool = False
    phrases: list[PhraseSpan] = field(default_factory=list)
    loose: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def words(self, raw: str) -> None:
        words = re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", "\n", raw)).strip()
        if not words:
            self.line_break |= "\n" in raw
            return
        if self.ended:
            self.problems.append(f"words follow {END}")
            self.ended = False
        if self.text:
            if self.line_break or "\n" in raw[: len(raw) - len(raw.lstrip())]:
                self.text += "\n"
            elif not _NO_SPACE_BEFORE.match(words) and not self.text.endswith(_NO_SPACE_BEHIND):
                self.text += " "
        if self.opened and self.start is None:
            self.start = len(self.text)
        self.text += words
        self.line_break = "\n" in raw[len(raw.rstrip()) :]

    def mark(self, mark: str) -> None:
        if mark == PHRASE_START:
            if self.opened:
                self.problems.append(f"a phrase begins inside another: {self._quoted()}")
            self._settle()
            self.opened, self.start = True, None
        elif mark == PHRASE_END:
            if self.opened:
                self._close()
            else:
                self.problems.append(f"{PHRASE_END} without {PHRASE_START}")
        elif mark == MASK:
            self._take_mask()
        elif mark == END and not self.ended:
            self.ended = True
        else:
            self.problems.append(f"{mark} does not belong here")

    def result(self) -> ParsedAnswer:
        if self.opened:
            self.problems.append(f"a phrase is not closed: {self._quoted()}")
            self.opened = False
        self._settle()
        if self.phrases:
            self.problems += [f"{MASK} number {index + 1} belongs to no phrase" for index in self.loose]
        return ParsedAnswer(self.text, tuple(self.phrases), tuple(self.loose), tuple(self.problems))

    def _close(self) -> None:
        self.opened = False
        if self.start is None:
            self.problems.append("an empty phrase")
            return
        self.phrases.append(PhraseSpan(self.text[self.start :], self.start, len(self.text), None))
        self.waiting = True

    def _take_mask(self) -> None:
        if self.opened:
            self.problems.append(f"a phrase is not closed before {MASK}: {self._quoted()}")
            self._close()
        if self.waiting:
            last = self.phrases[-1]
            self.phrases[-1] = PhraseSpan(last.text, last.start, last.end, self.masks)
            self.waiting = False
        else:
            self.loose.append(self.masks)
        self.masks += 1

    def _settle(self) -> None:
        """The last phrase takes no [SEG] any more."""
        if self.waiting:
            self.problems.append(f"a phrase has no {MASK}: {self.phrases[-1].text[:40]!r}")
            self.waiting = False

    def _quoted(self) -> str:
        return repr("" if self.start is None else self.text[self.start :][:40])
