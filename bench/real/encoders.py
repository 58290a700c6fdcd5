"""The published encoders: rxnfp's BERTs of reactions, sapiens' RoBERTas of antibody chains.

Sequences are made here: reactions of the vocabulary, and chains that sapiens draws itself.
"""

from __future__ import annotations

import functools
import re
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn

RXNFP = {"pretrained": "bert_pretrained", "10k": "bert_ft_10k_25s", "pistachio": "bert_ft"}
SAPIENS = {"heavy": "checkpoint_vh.pt", "light": "checkpoint_vl.pt"}
OF_RXNFP, OF_SAPIENS = "rxnfp/models/transformers", "sapiens/models/v1"
SWAPPED = {"rxnfp": {"Cl": "Br", "F": "Br"}, "sapiens": {"K": "R", "D": "E", "I": "V", "L": "V"}}
"""Token -> what *swapped* reads it as: halogens as bromine, residues as their likes."""
MASKED = 0.15
SEQUENCES, LONGEST = 480, 62


class Encoder:
    """A published encoder and its vocabulary."""

    ideas, adapted = ("masked", "swapped"), r"encoder\..*"

    def __init__(self, data: Path, name: str) -> None:
        from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

        self.package = "rxnfp" if name in RXNFP else "sapiens"
        if self.package == "rxnfp":
            words = (data / OF_RXNFP / "bert_ft/vocab.txt").read_text().split()
            config = BertConfig(
                vocab_size=len(words),
                hidden_size=256,
                num_hidden_layers=12,
                num_attention_heads=4,
                intermediate_size=512,
            )
            self.model: nn.Module = BertModel(config, add_pooling_layer=False)
            weights = load_bert(data / OF_RXNFP / RXNFP[name] / "pytorch_model.bin")
            self.start, self.end, self.pad, self.mask = (
                words.index(f"[{word}]") for word in ("CLS", "SEP", "PAD", "MASK")
            )
        else:
            lines = (data / OF_SAPIENS / "dict.txt").read_text().splitlines()
            words = ["<s>", "<pad>", "</s>", "<unk>", *(x.split()[0] for x in lines), "<mask>"]
            weights, self.head = load_sapiens(data / OF_SAPIENS / SAPIENS[name])
            config = RobertaConfig(
                vocab_size=len(words),
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=8,
                intermediate_size=256,
                max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
                type_vocab_size=1,
                layer_norm_eps=1e-5,
            )
            self.model = RobertaModel(config, add_pooling_layer=False)
            self.start, self.pad, self.end, self.mask = 0, 1, 2, len(words) - 1
        self.words = {word: i for i, word in enumerate(words)}
        missing, _ = self.model.load_state_dict(weights, strict=False)
        assert not [name for name in missing if "position_ids" not in name], missing
        self.model.eval().requires_grad_(False)

    def answer(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Tokens [n, length] -> answers [n, length, width], zero at the padding."""
        there = tokens != self.pad
        answer = model(input_ids=tokens, attention_mask=there.long()).last_hidden_state
        return answer * there[..., None]

    def encode(self, sequences: list[list[str]]) -> Tensor:
        """Words -> tokens [n, length]."""
        rows = [[self.start, *(self.words[w] for w in one), self.end] for one in sequences]
        longest = max(map(len, rows))
        return torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])

    def ask(self, idea: str, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(what the LoRA reads, what it is to be read as)."""
        if idea == "masked":
            special = sum(tokens == one for one in (self.start, self.end, self.pad)).bool()
            hidden = torch.rand(tokens.shape, generator=generator) < MASKED
            return torch.where(hidden & ~special, self.mask, tokens), tokens
        table = torch.arange(len(self.words))
        for old, new in SWAPPED[self.package].items():
            table[self.words[old]] = self.words[new]
        return tokens, table[tokens]


def load_bert(path: Path) -> dict[str, Tensor]:
    """Weights in the names of transformers' BertModel."""
    stored = torch.load(path, weights_only=True, map_location="cpu")
    return {name.removeprefix("bert."): tensor for name, tensor in stored.items()}


ROBERTA = (
    ("decoder.sentence_encoder.embed_tokens", "embeddings.word_embeddings"),
    ("decoder.sentence_encoder.embed_positions", "embeddings.position_embeddings"),
    ("decoder.sentence_encoder.emb_layer_norm", "embeddings.LayerNorm"),
    ("decoder.sentence_encoder.layers", "encoder.layer"),
    ("self_attn.q_proj", "attention.self.query"),
    ("self_attn.k_proj", "attention.self.key"),
    ("self_attn.v_proj", "attention.self.value"),
    ("self_attn.out_proj", "attention.output.dense"),
    ("self_attn_layer_norm", "attention.output.LayerNorm"),
    ("fc1", "intermediate.dense"),
    ("fc2", "output.dense"),
    ("final_layer_norm", "output.LayerNorm"),
)


def load_sapiens(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights in the names of transformers' RobertaModel, and those of the head."""
    with torch.serialization.safe_globals([Namespace]):
        stored = torch.load(path, weights_only=True, map_location="cpu")["model"]
    weights, head = {}, {}
    for name, tensor in stored.items():
        tensor = tensor.float()
        if name.startswith("decoder.lm_head."):
            head[name.removeprefix("decoder.lm_head.")] = tensor
            continue
        for old, new in ROBERTA:
            name = name.replace(old, new)
        weights[name] = tensor
    weights["embeddings.token_type_embeddings.weight"] = torch.zeros(1, 128)
    return weights, head


def guess(encoder: Encoder, tokens: Tensor) -> Tensor:
    """Probabilities [n, length, words] of sapiens' head."""
    head = encoder.head
    x = encoder.answer(encoder.model, tokens) @ head["dense.weight"].mT + head["dense.bias"]
    norm = head["layer_norm.weight"], head["layer_norm.bias"]
    x = nn.functional.layer_norm(nn.functional.gelu(x), (128,), *norm)
    return (x @ head["weight"].mT + head["bias"]).softmax(-1)


EXAMPLE = "Nc1cccc2cnccc12.O=C(O)c1cc([N+](=O)[O-])c(Sc2c(Cl)cncc2Cl)s1>>"
EXAMPLE += "O=C(Nc1cccc2cnccc12)c1cc([N+](=O)[O-])c(Sc2c(Cl)cncc2Cl)s1"
CHAIN = "**QLV*SGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSLQ"
CHAIN += "FDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS"


def check_loading(data: Path) -> None:
    """Compares with the numbers in the READMEs of both packages."""
    encoder = open_encoder(data, "pistachio")
    first = encoder.answer(encoder.model, encoder.encode([split_smiles(EXAMPLE)]))[0, 0, :5]
    published = [-2.0174953937530518, 1.7602033615, -1.3323537111, -1.1095019579, 1.2254549265]
    torch.testing.assert_close(first, torch.tensor(published), rtol=1e-4, atol=1e-4)
    encoder = open_encoder(data, "heavy")
    chain = [word.replace("*", "<mask>") for word in CHAIN]
    guessed = guess(encoder, encoder.encode([chain]))[0, 1, 4:8]
    published = [0.003272, 0.004147, 0.004011, 0.004590]
    torch.testing.assert_close(guessed, torch.tensor(published), rtol=1e-3, atol=2e-6)


SMILES = re.compile(r"\[[^\]]+]|Br|Cl|>>|%\d\d|.")


def split_smiles(text: str) -> list[str]:
    return SMILES.findall(text)


GROUPS = (
    "C CC CCC CC(C)C C(F)(F)F OC OCC N(C)C C#N c9ccccc9 c9ccncc9 Cl Br F [N+](=O)[O-] C(C)(C)C "
)
GROUPS += "SC C(=O)OC CO C9CC9 N9CCOCC9 OC(F)(F)F C(C)=O c9ccc(F)cc9 c9ccsc9"
RINGS = "c1ccc({})cc1 c1cc({})cnc1 c1cccc({})c1 c1cc({})sc1 c1cc({})c2ccccc2c1 C1CCN({})CC1"
REACTIONS = """
O=C(O){a}.N{b}>>O=C(N{b}){a}
O=C(O){a}.O{b}>>O=C(O{b}){a}
O=C(Cl){a}.N{b}.CCN(CC)CC>>O=C(N{b}){a}
Br{a}.OB(O){b}.O=C([O-])[O-].[K+].[K+].[Pd]>>{a}{b}
O=C{a}.N{b}.[BH4-].[Na+]>>C(N{b}){a}
BrC{a}.O{b}.O=C([O-])[O-].[K+].[K+]>>C(O{b}){a}
O=[N+]([O-]){a}.[Fe].O{b}>>N{a}
N#C{a}.O{b}.Cl>>O=C(O{b}){a}
O=S(=O)(Cl){a}.N{b}.c1ccncc1>>O=S(=O)(N{b}){a}
COC(=O){a}.[OH-].[Na+].O{b}>>O=C(O){a}
""".split()
"""Usual reactions of two rings with a group each."""


def write_reactions(count: int) -> list[list[str]]:
    """Different reactions, in the vocabulary of rxnfp."""
    generator, texts = torch.Generator().manual_seed(1), dict[str, None]()

    def pick(texts: str | list[str]) -> str:
        texts = texts.split() if isinstance(texts, str) else texts
        return texts[int(torch.randint(len(texts), (), generator=generator))]

    while len(texts) < count:
        a, b = (pick(RINGS).format(pick(GROUPS)) for _ in "ab")
        text = pick(REACTIONS).format(a=a, b=b)
        if len(split_smiles(text)) <= LONGEST:
            texts[text] = None
    return [split_smiles(text) for text in texts]


def write_chains(encoder: Encoder, count: int, length: int) -> list[list[str]]:
    """Chains that sapiens draws, a few residues at a time in random order."""
    generator = torch.Generator().manual_seed(2)
    tokens = encoder.encode([["<mask>"] * length] * count)
    order = 1 + torch.rand(count, length, generator=generator).argsort(1)
    for places in order.split(6, 1):
        chances = guess(encoder, tokens)[..., 4:24].gather(1, places[..., None].expand(-1, -1, 20))
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator)
        tokens.scatter_(1, places, 4 + drawn.reshape(places.shape))
    names = {i: word for word, i in encoder.words.items()}
    return [[names[i] for i in row] for row in tokens[:, 1:-1].tolist()]


@functools.cache
def open_encoder(data: Path, name: str) -> Encoder:
    return Encoder(data, name)


@functools.cache
@torch.no_grad()
def write_sequences(data: Path, package: str) -> Tensor:
    """Tokens [n, length] that encoders of a package are asked about."""
    if package == "rxnfp":
        return open_encoder(data, "pretrained").encode(write_reactions(SEQUENCES))
    encoders = {open_encoder(data, "heavy"): 118, open_encoder(data, "light"): 108}
    drawn = [write_chains(encoder, SEQUENCES // 2, n) for encoder, n in encoders.items()]
    return next(iter(encoders)).encode([x for both in zip(*drawn, strict=True) for x in both])
