"""Malformed instructions: «» marks where the carets must stand, then a part of the message and of the suggestion.

The README of ofakern/instruction shows each of them with its whole message (`readme_sections.py` writes it).
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    title: str
    marked: str
    message: str
    suggestion: str = ""

    @property
    def text(self) -> str:
        return self.marked.replace("«", "").replace("»", "")


GRAMMAR = (
    Case("Unknown modality", "[«IMGE»:img] -> [TEXT:cap]", "modality must be one of TEXT, IMAGE", "'IMAGE'"),
    Case("Unknown modality, another system's name", "[IMAGE:i] -> [«BOUNDING_BOX»]", "modality must be", "'BOX'"),
    Case("Brackets meant as plain text", "fill the [«MASK»] -> [TEXT:x]", "modality must be", r"write \[ and \]"),
    Case("Wrong case", "[«text»:src] -> [TEXT:tgt]", "must be written in upper case, got 'text'", "'TEXT'"),
    Case("No modality", "[«:»src] -> [TEXT:tgt]", "must begin with a modality", "[TEXT:name]"),
    Case("Bracket inside a bracket", "[IMAGE:i] -> [«[»BOX][TEXT]]*", "got another `[`", "([BOX:b] [TEXT:t])*"),
    Case("Unclosed bracket", "«[»TEXT:src what is it? -> [TEXT:tgt]", "must be closed by `]`", "add ]"),
    Case("Unclosed bracket at the end", "[TEXT:src] -> «[»TEXT:tgt,no_loss", "must be closed by `]`", "add ]"),
    Case("Closing bracket alone", "[TEXT:src] -> [TEXT:tgt]«]»", "got one without `[`", r"write \]"),
    Case("Full-width bracket", "看图回答«［»TEXT:src］ -> [TEXT:tgt]", "must begin with [, got ［", "'['"),
    Case("Full-width mark", "[TEXT«：»src] -> [TEXT:tgt]", "must be ASCII", "':'"),
    Case("Empty name", "[TEXT:«]» -> [TEXT:tgt]", "must not be empty after `:`", "[TEXT] for an unnamed slot"),
    Case("Character that a name cannot have", "[TEXT:my«-»text] -> [TEXT:tgt]", "A-Z a-z 0-9 _, got '-'", "'my_text'"),
    Case("Blank in a name", "[TEXT:my «t»ext] -> [TEXT:tgt]", "must follow the name 'my'", "'my_text'"),
    Case("Colon forgotten", "[TEXT «s»rc] -> [TEXT:tgt]", "`:` must stand before a slot's name", "'[TEXT:src]'"),
    Case("Second name", "[TEXT:src«:»more] -> [TEXT:tgt]", "must follow the name 'src', got ':'"),
    Case("Equals for colon", "[TEXT«=»src] -> [TEXT:tgt]", "must follow `:`, got `=`", "':'"),
    Case(
        "Comma forgotten", "[TEXT:src,uncased «n»o_punctuation] -> [TEXT:tgt]", "attribute 'uncased', got 'n'", "comma"
    ),
    Case(
        "Empty attribute", "[TEXT:src,«]» -> [TEXT:tgt]", "an attribute must begin with its name", "none after the last"
    ),
    Case("Empty value", "[TEXT:src,max_length=«]» -> [TEXT:tgt]", "must have a value after `=`", 'max_length=""'),
    Case("Value that needs quotes", "[STRUCT:db,col_type=«(»c)] -> [TEXT:tgt]", "must stand in quotes", 'key="value"'),
    Case("Unclosed quote", '[STRUCT:db,col_type=«"»c:k] -> [TEXT:tgt]', 'must end with "'),
    Case("Duplicate attribute", "[TEXT:src,uncased,«uncased»] -> [TEXT:tgt]", "must be given once", "keep one"),
    Case("One name, two modalities", "[TEXT:x] -> [«BOX»:x]", "must have one modality, got BOX after TEXT", "[TEXT:x]"),
    Case(
        "No arrow",
        "[IMAGE:img] what does the image describe?«»",
        "must have one `->`",
        "end it with `-> [TEXT:answer]`",
    ),
    Case("Another arrow", "[TEXT:src] «=>» [TEXT:tgt]", "must have one `->` between", "'->'"),
    Case("Arrow with more strokes", "[TEXT:src] «-->» [TEXT:tgt]", "must be written ->, got -->", "'->'"),
    Case("Two arrows", "[TEXT:a] -> [TEXT:b] «->» [TEXT:c]", "got a second one", r"write \->"),
    Case("Empty target", "[TEXT:src] «->»", "the target must hold at least one slot, got nothing", "-> [TEXT:answer]"),
    Case("Target without a slot", "[IMAGE:i] what is it? -> «a cat»", "got only plain text", "-> [TEXT:answer]"),
    Case("Empty alternative", "[TEXT:a] -> [TEXT:b] |||«»", "must have the form `source -> target`, got nothing"),
    Case("Too many pipes", "[TEXT:a] -> [TEXT:b] «||||» [TEXT:a] -> [TEXT:c]", "must be separated by |||, got ||||"),
    Case("Unclosed group", "[IMAGE:i] -> «(»[BOX:b] [TEXT:t]", "must be closed by `)*`", r"write \("),
    Case("Group without a star", "[IMAGE:i] -> ([BOX:b] [TEXT:t]«)»", "got no `*`", "add *"),
    Case("Star without a group", "[IMAGE:i] -> [BOX:b]«*»", "must follow a repeated group", "([BOX:b])*"),
    Case("Closed group without an opening", "[IMAGE:i] -> [BOX:b] [TEXT:t]«)*»", "got one without `(`"),
    Case("Group without a slot", "say it «(again)*» -> [TEXT:t]", "must hold at least one slot", r"write \*"),
    Case("Nested groups", "[IMAGE:i] -> ([BOX:b] «(»[TEXT:t])*)*", "must not stand inside another", "close the first"),
    Case("Unknown escape", r"a line «\n» more -> [TEXT:t]", "a backslash must stand before one of", r"write \\"),
)

ATTRIBUTES = (
    Case(
        "Unknown attribute",
        "[TEXT:src] -> [TEXT:tgt,«closedset»]",
        "one that TEXT accepts in the target",
        "'closed_set'",
    ),
    Case(
        "Attribute of another spelling",
        "[IMAGE:i,«preprocessor»=imagenet] -> [TEXT:t]",
        "got 'preprocessor'",
        "'preprocess'",
    ),
    Case(
        "Attribute that nothing resembles",
        "[IMAGE:i,«colour»=red] -> [TEXT:t]",
        "got 'colour'",
        "one of preprocess, adaptor",
    ),
    Case("Name after a comma", "[TEXT,«cap»] -> [TEXT:t]", "got 'cap'", "'[TEXT:cap]'"),
    Case(
        "Attribute of another preprocessor",
        "[STRUCT:db,preprocess=database,«col_type»=c:k] -> [TEXT:t]",
        "got 'col_type'",
        "preprocess=table",
    ),
    Case(
        "Attribute on the wrong side",
        "[TEXT:q,«closed_set»] -> [TEXT:a]",
        "must stand in the target, got it in the source",
    ),
    Case(
        "Not a whole number",
        "[TEXT:src,max_length=«ten»] -> [TEXT:t]",
        "must be a whole number of at least 1, got 'ten'",
    ),
    Case("Out of range", "[TEXT:src,max_length=«-1»] -> [TEXT:t]", "must be a whole number of at least 1, got '-1'"),
    Case("Share out of range", "[TEXT:src,mask_ratio=«30»] -> [TEXT:t]", "must be a number from 0 to 1, got '30'"),
    Case("No value", "[TEXT:src,«max_length»] -> [TEXT:t]", "got no value", "max_length=30"),
    Case("Not a flag's value", "[TEXT:src,uncased=«yes»] -> [TEXT:t]", "must be a flag", "'true'"),
    Case(
        "Unknown preprocessor",
        "[IMAGE:i,preprocess=«imagnet»] -> [TEXT:t]",
        "'preprocess' of IMAGE must be one of",
        "'imagenet'",
    ),
    Case(
        "Unknown adaptor",
        "[IMAGE:i,adaptor=«resnet»] -> [TEXT:t]",
        "'adaptor' of IMAGE must be one of",
        "'image_resnet'",
    ),
    Case(
        "Adaptor that does not fit",
        "[IMAGE:i,preprocess=image,adaptor=«image_vqgan»] -> [TEXT:t]",
        "the adaptor of preprocessor 'image'",
    ),
    Case(
        "Modality on the wrong side",
        "[TEXT:t] -> [«VIDEO»:v]",
        "of VIDEO must stand in the source, got it in the target",
    ),
    Case(
        "Preprocessor on the wrong side",
        "[TEXT:t] -> [IMAGE:i,preprocess=«image»]",
        "must stand in the source",
        "image_vqgan",
    ),
    Case("Adaptor on the wrong side", "[AUDIO:a,adaptor=«audio_tgt_fbank»] -> [TEXT:t]", "must stand in the target"),
    Case(
        "Box in an unknown image",
        "[IMAGE:i] -> [BOX:b,image=«img»]",
        "must name an IMAGE slot of the source, got 'img'",
        "image=i",
    ),
    Case("Nothing to learn", "[TEXT:src] -> «[TEXT:tgt,no_loss]»", "at least one slot with a loss"),
    Case("One name learnt twice", "[TEXT:src] -> [TEXT:tgt] and [TEXT:«tgt»]", "learnt once", "no_loss on the copy"),
    Case(
        "Name taken by an unnamed slot",
        "[TEXT] -> [TEXT:«0»]",
        "must not be the place of an unnamed slot",
        "name all slots",
    ),
    Case(
        "One name inside and outside of a group",
        "[TEXT:t] -> ([BOX:b] [TEXT:«t»])*",
        "only inside or only outside",
        "a list",
    ),
)
