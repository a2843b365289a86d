"""Calico's selector language: text to label expressions and back (reference/policy.md, 1.4).

::

    expr    := and { "||" and }
    and     := unary { "&&" unary }
    unary   := "!" unary | "(" expr ")" | "all()" | "global()" | "has(" label ")" | label test
    test    := ("==" | "!=") string | ("in" | "not in") "{" [string {"," string}] "}"
             | ("contains" | "starts with" | "ends with") string

The empty text is ``all()``. A string stands in single or double quotes and knows no escapes; a blank is a
space or a tab, and may be left out between the two words of an operator. ``!=`` and ``not in`` are true
where the label is absent.

Labels of the endpoint's namespace and service account: Calico keeps them under ``pcns.`` and ``pcsa.``,
and so may a user's selector; here they stand in labels' own, so that no pod's label can claim them.
"""

from __future__ import annotations

import re
from typing import Final

from portwright.model.errors import InvalidInput
from portwright.policy.labels import (
    EVERYTHING,
    NAMESPACE_NAME,
    NAMESPACE_PREFIX,
    NOTHING,
    SERVICE_ACCOUNT_PREFIX,
    And,
    Contains,
    EndsWith,
    Everything,
    Expr,
    Has,
    In,
    Not,
    Or,
    StartsWith,
)

#: Characters of one selector. Calico's schema allows 1,024 of most, and states none for some.
MAX_LENGTH: Final = 8192
#: Characters of a label's name, as in Calico.
MAX_LABEL: Final = 512
#: Parentheses within parentheses.
MAX_DEPTH: Final = 64

#: What Calico calls the namespace and the service account of an endpoint in its labels.
CALICO_NAMESPACE: Final = "projectcalico.org/namespace"
CALICO_SERVICE_ACCOUNT: Final = "projectcalico.org/serviceaccount"
#: What it calls each of them in that one's own labels.
CALICO_NAME: Final = "projectcalico.org/name"
#: The key of the namespace's name: an endpoint that lacks it is in no namespace.
NAMESPACE_KEY: Final = NAMESPACE_PREFIX + NAMESPACE_NAME

_CALICO_PREFIXES: Final = {"pcns.": NAMESPACE_PREFIX, "pcsa.": SERVICE_ACCOUNT_PREFIX}
_LABEL = re.compile(r"[A-Za-z0-9_./-]+")
_BLANK = re.compile(r"[ \t]*")
_NO_LABEL_FOLLOWS = r"(?![A-Za-z0-9_./-])"
_OPERATOR = re.compile(
    rf"(?P<is>==)|(?P<isnot>!=)"
    rf"|(?P<contains>contains){_NO_LABEL_FOLLOWS}"
    rf"|(?P<starts>starts[ \t]*with){_NO_LABEL_FOLLOWS}"
    rf"|(?P<ends>ends[ \t]*with){_NO_LABEL_FOLLOWS}"
    rf"|(?P<notin>not[ \t]*in){_NO_LABEL_FOLLOWS}"
    rf"|(?P<in>in){_NO_LABEL_FOLLOWS}"
)


def parse(text: str, field: str = "selector") -> Expr:
    """The expression of a selector over an endpoint's own labels.

    ``pcns.k`` and ``pcsa.k`` in it are the namespace's and the service account's ``k``. Raises
    :class:`InvalidInput` that names ``field`` and the character, from 1, where the mistake stands.
    ``global()`` is such a mistake: it has a meaning in a namespaceSelector alone.
    """
    return _Parser(text, field, prefix="", every=EVERYTHING).whole()


def parse_namespace(text: str, field: str = "namespaceSelector") -> Expr:
    """The expression of a selector over the labels of the endpoint's namespace.

    ``all()`` is: in a namespace, whichever. ``global()``, which must stand alone, is: in none (host
    endpoints and global network sets). As in Calico, a negative selector (``env != 'prod'``) is true of
    what has no namespace. Raises as :func:`parse`.
    """
    bare = text.strip(" \t").replace(" ", "").replace("\t", "")
    if bare == "global()":
        return Not(Has(NAMESPACE_KEY))
    if "global(" in bare:
        raise InvalidInput(field, text, "global() stands alone: write a rule of its own for the rest")
    return _Parser(text, field, prefix=NAMESPACE_PREFIX, every=Has(NAMESPACE_KEY)).whole()


def parse_service_account(text: str, field: str = "serviceAccountSelector", every: Expr = EVERYTHING) -> Expr:
    """The expression of a selector over the labels of the endpoint's service account.

    ``every`` is what ``all()`` becomes: Calico means every endpoint by it in some places, and in others
    those that have a service account. Raises as :func:`parse`.
    """
    return _Parser(text, field, prefix=SERVICE_ACCOUNT_PREFIX, every=every).whole()


def negate(expr: Expr) -> Expr:
    """Its opposite, without a double negation."""
    match expr:
        case Not(term):
            return term
        case Everything():
            return NOTHING
        case Or(()):
            return EVERYTHING
        case _:
            return Not(expr)


def render(expr: Expr) -> str:
    """The canonical text: of one expression always the same, and ``parse`` makes that expression of it.

    Values of a set are sorted; parentheses stand around each group but the outermost. Raises
    :class:`InvalidInput` for a text that holds both kinds of quotes, which the language cannot say.
    """
    match expr:
        case And(terms) if len(terms) > 1:
            return " && ".join(_render_inner(term) for term in terms)
        case Or(terms) if len(terms) > 1:
            return " || ".join(_render_inner(term) for term in terms)
        case _:
            return _render_inner(expr)


def _render_inner(expr: Expr) -> str:
    match expr:
        case Everything() | And(()):
            return "all()"
        case Or(()):
            return "!all()"
        case And((only,)) | Or((only,)):
            return _render_inner(only)
        case And(_) | Or(_):
            return f"({render(expr)})"
        case Has(key):
            return f"has({_name(key)})"
        case In(key, values):
            return _membership(key, values, "==", "in")
        case Not(In(key, values)):
            return _membership(key, values, "!=", "not in")
        case Contains(key, text):
            return f"{_name(key)} contains {_quote(text)}"
        case StartsWith(key, text):
            return f"{_name(key)} starts with {_quote(text)}"
        case EndsWith(key, text):
            return f"{_name(key)} ends with {_quote(text)}"
        case Not(term):
            return f"!{_render_inner(term)}"


def _membership(key: str, values: frozenset[str], single: str, several: str) -> str:
    quoted = sorted(map(_quote, values))
    if len(quoted) == 1:
        return f"{_name(key)} {single} {quoted[0]}"
    return f"{_name(key)} {several} {{{', '.join(quoted)}}}"


def _quote(text: str) -> str:
    mark = "'" if '"' in text else '"'
    if mark in text:
        raise InvalidInput("selector", text, "a selector can't quote a text with both ' and \"")
    return f"{mark}{text}{mark}"


def _name(key: str) -> str:
    """A key as Calico writes it."""
    if key == NAMESPACE_KEY:
        return CALICO_NAMESPACE
    for calico, ours in _CALICO_PREFIXES.items():
        if key.startswith(ours):
            return calico + key.removeprefix(ours)
    return key


def _key(name: str, prefix: str) -> str:
    """The key of a label that a selector names; ``prefix`` is whose selector it is."""
    if not prefix:
        for calico, ours in _CALICO_PREFIXES.items():
            if name.startswith(calico) and name != calico:
                return _key(name.removeprefix(calico), ours)
        return NAMESPACE_KEY if name == CALICO_NAMESPACE else name
    if name == CALICO_NAME:
        return NAMESPACE_KEY if prefix == NAMESPACE_PREFIX else CALICO_SERVICE_ACCOUNT
    return prefix + name


class _Parser:
    """One pass over one text: ``at`` is the next character that is not read."""

    def __init__(self, text: str, field: str, prefix: str, every: Expr) -> None:
        self.text = text
        self.field = field
        self.prefix = prefix
        self.every = every
        self.at = 0
        self.depth = 0

    def whole(self) -> Expr:
        """The expression that the text is."""
        if len(self.text) > MAX_LENGTH:
            raise InvalidInput(self.field, self.text, f"a selector has at most {MAX_LENGTH} characters")
        self.blanks()
        if self.at == len(self.text):
            return self.every
        expr = self.either()
        if self.at < len(self.text):
            raise self.mistake("expected && or || or the end")
        return expr

    def either(self) -> Expr:
        terms = [self.all_of()]
        while self.take("||"):
            terms.append(self.all_of())
        return terms[0] if len(terms) == 1 else Or(tuple(terms))

    def all_of(self) -> Expr:
        terms = [self.unary()]
        while self.take("&&"):
            terms.append(self.unary())
        return terms[0] if len(terms) == 1 else And(tuple(terms))

    def unary(self) -> Expr:
        negated = False
        while self.text.startswith("!", self.at) and not self.text.startswith("!=", self.at):
            self.take("!")
            negated = not negated
        expr = self.operand()
        return negate(expr) if negated else expr

    def operand(self) -> Expr:
        if self.take("("):
            if self.depth == MAX_DEPTH:
                raise self.mistake(f"parentheses are nested more than {MAX_DEPTH} deep")
            self.depth += 1
            expr = self.either()
            self.depth -= 1
            self.expect(")")
            return expr
        if self.take("has("):
            key = self.label()
            self.expect(")")
            return Has(key)
        if self.take("all("):
            self.expect(")")
            return self.every
        if self.text.startswith("global(", self.at):
            raise self.mistake("global() has a meaning in a rule's namespaceSelector alone; leave it out")
        return self.comparison()

    def comparison(self) -> Expr:
        key = self.label()
        found = _OPERATOR.match(self.text, self.at)
        if found is None:
            raise self.mistake(
                "expected ==, !=, in, not in, contains, starts with or ends with; any value: has(label)"
            )
        self.at = found.end()
        self.blanks()
        match found.lastgroup:
            case "is":
                return In(key, frozenset({self.string()}))
            case "isnot":
                return Not(In(key, frozenset({self.string()})))
            case "contains":
                return Contains(key, self.string())
            case "starts":
                return StartsWith(key, self.string())
            case "ends":
                return EndsWith(key, self.string())
            case "in":
                return In(key, self.strings())
            case _:
                return Not(In(key, self.strings()))

    def strings(self) -> frozenset[str]:
        """A set in braces; a comma after its last value does no harm."""
        self.expect("{")
        values: set[str] = set()
        while self.text[self.at : self.at + 1] in {"'", '"'}:
            values.add(self.string())
            if not self.take(","):
                break
        self.expect("}")
        return frozenset(values)

    def string(self) -> str:
        mark = self.text[self.at : self.at + 1]
        if mark not in {"'", '"'}:
            raise self.mistake("expected a value in quotes")
        end = self.text.find(mark, self.at + 1)
        if end < 0:
            raise self.mistake(f"this quote has no closing {mark}")
        value = self.text[self.at + 1 : end]
        self.at = end + 1
        self.blanks()
        return value

    def label(self) -> str:
        found = _LABEL.match(self.text, self.at)
        if found is None:
            raise self.mistake("expected a label's name (letters, digits and _ . / -)")
        if len(found.group()) > MAX_LABEL:
            raise self.mistake(f"a label's name has at most {MAX_LABEL} characters")
        self.at = found.end()
        self.blanks()
        return _key(found.group(), self.prefix)

    def take(self, token: str) -> bool:
        """Whether ``token`` is next; if so it and the blanks after it are read."""
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        self.blanks()
        return True

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.mistake(f"expected {token}")

    def blanks(self) -> None:
        found = _BLANK.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def mistake(self, why: str) -> InvalidInput:
        """The error for what stands at the next character."""
        if self.at >= len(self.text):
            where = "at its end"
        else:
            where = f"at character {self.at + 1}, {self.text[self.at]!r}"
            if self.text[self.at] in "\r\n":
                why = "a line break is no blank in a selector: fold its lines into one (YAML: >-)"
        return InvalidInput(self.field, self.text, f"{where}: {why}")
