"""The instruction language: one line of text -> a tree of slots, plain text and repeated groups."""

from ofakern.errors import InstructionError
from ofakern.instruction.modality import Modality
from ofakern.instruction.nodes import Attribute, Group, Instruction, Node, PlainText, Slot, Span
from ofakern.instruction.parser import parse
from ofakern.instruction.render import close_match, display_width, instruction_error, pad

__all__ = [
    "Attribute",
    "Group",
    "Instruction",
    "InstructionError",
    "Modality",
    "Node",
    "PlainText",
    "Slot",
    "Span",
    "close_match",
    "display_width",
    "instruction_error",
    "pad",
    "parse",
]
