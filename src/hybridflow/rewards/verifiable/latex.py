r"""Parses a mathematical answer into a tree, from LaTeX, plain text or Unicode. No sympy here.

A parser by precedence, from lists (``1, 2``, ``1 or 2``) over relations, unions, ratios, sums and products to powers.
What is ambiguous it does not read, because a tree must never say less than the text: ``2 3``, ``1/2x``, ``x'' ( '``
raise `Unreadable`.
"""

from __future__ import annotations

from hybridflow.rewards.verifiable.latex_names import (
    ACCENTS,
    CLOSING,
    CONSTANTS,
    CURRENCIES,
    ENDS,
    FUNCTIONS,
    GREEK,
    JOINS,
    MATRICES,
    PAIRED,
    PLAIN_WORDS,
    RELATIONS,
    STARTING,
    TRIGONOMETRIC,
    name_in_text,
)
from hybridflow.rewards.verifiable.latex_tokens import Token, commas_part_thousands, tokens
from hybridflow.rewards.verifiable.latex_tree import MEASURES, Node, Unreadable, added, joined, measured, without_unit
from hybridflow.rewards.verifiable.units import CANONICAL, MULTIPLES, NOT_UNITS, UNITS

_END = Token("end", "")


def read(text: str) -> Node:
    r"""Parses a whole text into a tree.

    >>> read(r"\frac12").kind, read("1, 2").kind, read("(1,2]").text, read(r"\begin{pmatrix}1\\2\end{pmatrix}").kind
    ('div', 'list', '(]', 'matrix')

    Raises:
        Unreadable: it is no expression.
    """
    return read_tokens(tokens(text))


def read_tokens(found: list[Token]) -> Node:
    """Parses all these tokens into a tree. Raises Unreadable, as `read`."""
    try:
        reader = _Reader(found)
        node = reader.sequence(())
    except RecursionError:
        raise Unreadable("too many brackets in each other") from None
    if reader.next is not _END:
        raise Unreadable(f"{reader.next.text!r} where an end was expected")
    return node


class _Reader:
    def __init__(self, found: list[Token]) -> None:
        self._tokens = found
        self._at = 0
        self._bars = 0  # of absolute values that are open

    @property
    def next(self) -> Token:
        return self._tokens[self._at] if self._at < len(self._tokens) else _END

    def peek(self, ahead: int = 1) -> Token:
        return self._tokens[self._at + ahead] if self._at + ahead < len(self._tokens) else _END

    def take(self) -> Token:
        token = self.next
        self._at += 1
        return token

    def is_next(self, *texts: str) -> bool:
        token = self.next
        return token.kind in ("symbol", "command") and token.text in texts

    def expect(self, *texts: str) -> str:
        if not self.is_next(*texts):
            raise Unreadable(f"{self.next.text!r} where {' or '.join(texts)} was expected")
        return self.take().text

    # Structures

    def sequence(self, closing: tuple[str, ...]) -> Node:
        """Parses the content of brackets, or of everything: one item, or a list of them."""
        thousands = commas_part_thousands(self._tokens[self._at :], bool(closing))
        items = [self.item(thousands)]
        separators: set[str] = set()
        said: set[str] = set()
        while self.is_next(",", "{,}", ";") or self._is_word("and", "or"):
            word = self._is_word("and", "or")
            separators.add("," if word else self.next.text.strip("{}"))
            while self._is_word("and", "or") or self.next.text in (",", "{,}", ";"):  # 1, 2, and 3
                said.add(self.take().text.lower().strip("{}"))
                if self.next.text in (",", "{,}", ";"):
                    raise Unreadable("nothing between two separators")
            items.append(self.item(thousands))
        if len(separators) > 1:
            raise Unreadable("both commas and semicolons part items")
        words = said & {"and", "or"}
        return items[0] if len(items) == 1 else Node("list", tuple(items), words.pop() if len(words) == 1 else "")

    def _is_word(self, *words: str) -> bool:
        return self.next.kind in ("text", "letters") and self.next.text.lower() in words

    def item(self, thousands: bool) -> Node:
        """Parses a relation, or anything else with a unit after it."""
        sides, signs = [self.join(thousands)], []
        while self.next.text in RELATIONS and self.next.kind in ("symbol", "command"):
            signs.append(RELATIONS[self.take().text])
            sides.append(self.join(thousands))
        if signs == ["congruent"] and self.is_next("\\pmod", "\\bmod", "\\mod"):
            self.take()
            sides.append(self._argument())
        return Node("relation", tuple(sides), " ".join(signs)) if signs else sides[0]

    def join(self, thousands: bool) -> Node:
        """Parses unions and other operations on sets, ratios, sums."""
        node = self.ratio(thousands)
        while self.is_next(*JOINS):
            node = Node(JOINS[self.take().text], (node, self.ratio(thousands)))
        return node

    def ratio(self, thousands: bool) -> Node:
        terms = [self.sum(thousands)]
        while self.is_next(":"):
            self.take()
            terms.append(self.sum(thousands))
        return Node("ratio", tuple(terms)) if len(terms) > 1 else terms[0]

    def sum(self, thousands: bool = False) -> Node:
        node: Node | None = None
        while True:
            sign = "+"
            if self.is_next("+", "-", "\\pm", "\\mp"):
                sign = self.take().text
            elif node is not None:
                return node
            term = self.term(thousands)
            if node is not None and "unit" in (node.kind, term.kind):
                raise Unreadable("a sum of units")
            node = added(node, sign, term)

    # Products and powers

    def term(self, thousands: bool) -> Node:
        currency = self.take().text if self.is_next(*CURRENCIES) else ""
        if currency and self.is_next("-"):
            self.take()
            return Node("neg", (self._amount(thousands, currency),))
        return self._amount(thousands, currency)

    def _amount(self, thousands: bool, currency: str) -> Node:
        node = self.product(thousands)
        if not currency:
            return node
        return Node("unit", (without_unit(node),), CURRENCIES[currency])

    def product(self, thousands: bool) -> Node:
        node, divided = self.power(thousands), False
        while True:
            if self.is_next("*", "\\times", "\\cdot"):
                self.take()
                node = joined("mul", node, self.signed())
            elif self.is_next("/", "\\div"):
                node, divided = self._quotient(node, divided), True
            elif (unit := self._unit()) is not None:
                return measured(node, unit)
            elif self._starts_factor():
                if divided:
                    raise Unreadable("a product after a quotient can be read in two ways")
                node = self._next_to(node)
            else:
                return node

    def _quotient(self, node: Node, divided: bool) -> Node:
        if divided and node.kind == "div" and node.text == "/":
            raise Unreadable("a quotient of a quotient")
        self.take()
        return joined("div", node, self.signed(), "/")

    def _next_to(self, node: Node) -> Node:
        """Parses a product without a sign, or a mixed number."""
        token = self.next
        is_whole = node.kind == "number" and node.text.isdigit()
        if token.kind == "number":
            if is_whole and self.peek().text == "/" and self.peek(2).kind == "number" and token.space == "wide":
                above, _, below = self.take().text, self.take(), self.take().text
                if above.isdigit() and below.isdigit() and self.next.kind not in ("number", "command", "begin"):
                    part = Node("div", (Node("number", (), above), Node("number", (), below)))
                    return self._with_marks(Node("mixed", (node, part)))
            raise Unreadable("numbers beside each other")
        factor = self.power()
        quotient = factor.parts[0] if factor.kind in MEASURES else factor
        is_mixed = is_whole and token.text == "\\frac" and quotient.kind == "div"
        is_mixed = is_mixed and all(part.kind == "number" and part.text.isdigit() for part in quotient.parts)
        return joined("mixed" if is_mixed else "mul", node, factor)

    def signed(self) -> Node:
        if self.is_next("-"):
            self.take()
            return Node("neg", (self.power(),))
        return self.power()

    def power(self, thousands: bool = False) -> Node:
        return self._with_marks(self.atom(thousands))

    def _with_marks(self, node: Node) -> Node:
        """Parses a value with the marks above and after it."""
        while True:
            if self.is_next("^"):
                if node.kind == "pow":
                    raise Unreadable("two powers")
                node = self._raised(node)
            elif self.is_next("!"):
                self.take()
                node = Node("factorial", (node,))
            elif self.is_next("\\degree"):
                self.take()
                node = Node("degree", (node,))
            elif self.is_next("%", "\\%"):
                self.take()
                node = Node("percent", (node,))
            else:
                return node

    def _raised(self, node: Node) -> Node:
        self.take()
        if self.is_next("{") and self.peek().text in ("\\circ", "\\degree") and self.peek(2).text == "}":
            self._at += 3
            return Node("degree", (node,))
        if self.is_next("\\circ", "\\degree"):
            self.take()
            return Node("degree", (node,))
        braced = self.is_next("{") and self.peek(2).text == "}"
        mark = self.peek().text if braced else self.next.text
        if mark in ("\\prime", "*", "\\top", "\\intercal") or (node.kind == "matrix" and mark == "T"):
            self._at += 3 if braced else 1
            return Node("call", (node,), "^\\prime" if mark == "\\prime" else "^*" if mark == "*" else "^T")
        return Node("pow", (node, self._script()))

    def _script(self) -> Node:
        """Parses an exponent: a group, or one number, name or function, with a sign."""
        if self.is_next("-", "+"):
            sign = self.take().text
            return Node("neg", (self._script(),)) if sign == "-" else self._script()
        if self.is_next("{", "("):
            closing = "}" if self.take().text == "{" else ")"
            node = self.sequence((closing,))
            self.expect(closing)
            return node
        if self.next.kind == "letters" and len(self.next.text) > 1:
            return self._split_letters()
        return self.atom()

    # Atoms

    def _starts_factor(self) -> bool:
        token = self.next
        if token.kind in ("number", "letters"):
            return not self._is_word("and", "or") and token.text not in ("in",)
        if token.kind == "command":
            return token.text[1:] in STARTING
        if token.kind == "begin":
            return True
        if token.kind == "text":
            return token.text.lower() not in ("and", "or") and name_in_text(token.text) is not None
        return token.text in ("(", "[", "{") or (token.text == "|" and not self._bars)

    def atom(self, thousands: bool = False) -> Node:
        token = self.next
        if token.kind == "number":
            return self._number(thousands)
        if token.kind == "letters":
            return self._split_letters()
        if token.kind == "begin":
            return self._matrix()
        if token.kind == "text":
            return self._text()
        if token.kind == "command" and token.text != "\\langle":
            return self._command()
        if token.text in CLOSING:
            return self._bracket()
        if token.text == "{":
            self.take()
            node = self.sequence(())
            self.expect("}")
            return node
        if token.text in ("|", "\\|"):
            return self._absolute()
        raise Unreadable(f"{token.text!r} where a value was expected")

    def _number(self, thousands: bool) -> Node:
        first = self.take()
        digits, _, exponent = first.text.lower().partition("e")
        groups = 0
        while not exponent and self._is_group_of_thousands(digits, groups, thousands):
            self._at += self.next.kind != "number"
            digits += self.take().text
            groups += 1
        if self.is_next("_"):
            raise Unreadable("a number with an index that is no base")
        node = Node("number", (), digits.removesuffix("."))
        if not exponent:
            return node
        power = Node("number", (), exponent.lstrip("+-"))
        power = Node("neg", (power,)) if exponent.startswith("-") else power
        return Node("mul", (node, Node("pow", (Node("number", (), "10"), power))))

    def _is_group_of_thousands(self, digits: str, groups: int, commas: bool) -> bool:
        comma = self.next
        group = self.peek() if comma.kind == "symbol" else comma
        if comma.kind == "symbol":
            marked = comma.text == "{,}" or (comma.text == "," and commas and comma.space == group.space == "")
        else:
            marked = group.space == "thin"
        head = group.text.partition(".")[0]
        first = groups > 0 or (len(digits) <= 3 and digits.isdigit() and digits[0] != "0")
        return marked and group.kind == "number" and len(head) == 3 and first and "." not in digits

    def _split_letters(self) -> Node:
        """Parses a name of one letter; leaves the rest of the run for the next."""
        token = self.take()
        word = token.text
        if word in PLAIN_WORDS or word in FUNCTIONS:
            self._at -= 1
            self._tokens[self._at] = Token("command", PLAIN_WORDS.get(word, f"\\{word}"), token.space)
            return self.atom()
        if len(word) > 1:
            self._at -= 1
            self._tokens[self._at] = Token("letters", word[1:])
        return self._name(word[0], last=len(word) == 1)

    def _name(self, name: str, last: bool = True) -> Node:
        if last and self.is_next("_"):
            self.take()
            name += f"_{self._index()}"
        while last and self.is_next("'"):
            self.take()
            name += "'"
        if last and name in ("f", "g", "h", "f'", "g'", "h'") and self.is_next("(") and self.next.space == "":
            self.take()
            arguments = self.sequence((")",))
            self.expect(")")
            return Node("call", (arguments,), name)
        return Node("constant", (), name) if name in ("e", "i") else Node("name", (), name)

    def _index(self) -> str:
        if not self.is_next("{"):
            return self.take().text
        return f"{{{self._group_text()}}}" if self.peek(2).text != "}" else self._group_text()

    def _group_text(self) -> str:
        """Returns the tokens of a group unchanged."""
        self.expect("{")
        depth = 1
        inside: list[str] = []
        while True:
            token = self.take()
            if token is _END:
                raise Unreadable("a group that does not end")
            depth += (token.text == "{") - (token.text == "}")
            if not depth:
                return " ".join(inside)
            inside.append(token.text)

    def _text(self) -> Node:
        said = self.take().text
        name = name_in_text(said)
        if name is None:
            return Node("word", (), said.lower())
        if name in FUNCTIONS:
            return self._function(name)
        return self._name(name)

    def _command(self) -> Node:
        command = self.take().text
        name = command[1:]
        if command in CONSTANTS:
            return Node("constant", (), CONSTANTS[command])
        if name in GREEK:
            return self._name(command)
        if name in FUNCTIONS:
            return self._function(name)
        if name == "frac":
            return Node("div", (self._argument(), self._argument()), "frac")
        if name == "binom":
            return Node("call", (self._argument(), self._argument()), "binom")
        if name in ("sqrt", "usqrt"):
            return self._root(digit=name == "sqrt")
        if name == "base":
            digits, base = self._group_text().replace(" ", ""), self._group_text()
            return Node("base", (), f"{digits.lstrip('0') or '0'}_{base}")
        if name in ACCENTS:
            inside = self._group_text() if self.is_next("{") else self.take().text
            return self._name(f"\\{name}{{{inside}}}")
        if name == "mathbb":
            return Node("constant", (), f"set {self._group_text() if self.is_next('{') else self.take().text}")
        if name in ("angle", "triangle"):
            return Node("name", (), command + "".join(self.take().text for _ in range(self.next.kind == "letters")))
        if command in PAIRED:
            return self._paired(command)
        raise Unreadable(f"{command} is not known")

    def _paired(self, opening: str) -> Node:
        closing, name = PAIRED[opening]
        inside = self.sequence((closing,))
        self.expect(closing)
        return Node("call", (inside,), name)

    def _root(self, digit: bool) -> Node:
        degree = Node("number", (), "2")
        if self.is_next("["):
            self.take()
            degree = self.sequence(("]",))
            self.expect("]")
        return Node("call", (self._argument() if digit else self._script(), degree), "root")

    def _argument(self) -> Node:
        """Parses the argument of a command: a group, or one digit, letter or command, as TeX does."""
        token = self.next
        if token.kind == "number" and len(token.text) > 1:
            if not token.text.isdigit():
                raise Unreadable("a decimal number without braces")
            self._tokens[self._at] = Token("number", token.text[1:])
            return Node("number", (), token.text[0])
        if token.kind == "letters":
            self._at += 1
            if len(token.text) > 1:
                self._at -= 1
                self._tokens[self._at] = Token("letters", token.text[1:])
            return Node("constant" if token.text[0] in "ei" else "name", (), token.text[0])
        if token.text in ("{", "\\{") or token.kind in ("number", "command", "text"):
            return self.atom()
        raise Unreadable(f"{token.text!r} where an argument was expected")

    def _function(self, name: str) -> Node:
        index = power = None
        while self.is_next("_", "^"):
            if self.take().text == "^":
                power = self._script()
            else:
                index = self._argument()
        argument = self._function_argument()
        node = Node("call", (argument,) if index is None else (argument, index), name)
        if power is None:
            return node
        if power == Node("neg", (Node("number", (), "1"),)):
            if name not in TRIGONOMETRIC:
                raise Unreadable(f"{name}^-1")
            return Node("call", (argument,), f"arc{name}")
        return Node("pow", (node, power))

    def _function_argument(self) -> Node:
        if self.is_next("(", "{", "["):
            closing = CLOSING.get(self.next.text, ("}",))
            self.take()
            argument = self.sequence(closing)
            self.expect(*closing)
            return argument
        node = self.power()
        while self._starts_factor() and self.next.text[1:] not in FUNCTIONS and self.next.text not in FUNCTIONS:
            node = self._next_to(node)
        if self.is_next("/", "\\div"):
            raise Unreadable("a quotient after an argument without brackets can be read in two ways")
        return node

    def _absolute(self) -> Node:
        opening = self.take().text
        self._bars += 1
        inside = self.sequence((opening,))
        self._bars -= 1
        self.expect(opening)
        if opening == "|" and inside.kind == "matrix":
            return Node("det", inside.parts)
        return Node("abs", (inside,)) if opening == "|" else Node("call", (inside,), "norm")

    def _bracket(self) -> Node:
        opening = self.take().text
        bars, self._bars = self._bars, 0
        if opening == "\\{" and self.is_next("\\}"):
            self.take()
            return Node("constant", (), "empty")
        inside = self.sequence(CLOSING[opening])
        closing = self.expect(*CLOSING[opening])
        self._bars = bars
        items = inside.parts if inside.kind == "list" else (inside,)
        if opening == "\\{":
            return Node("set", items)
        if opening == "(" and closing == ")" and len(items) == 1:
            return inside
        if len(items) == 1 and inside.kind == "matrix":
            return inside
        if opening + closing in ("(]", "[)") and len(items) != 2:
            raise Unreadable("a half-open interval has two ends")
        return Node("bracket", items, "()" if opening == "\\langle" else opening + closing)

    def _matrix(self) -> Node:
        name = self.take().text.removesuffix(" with columns")
        if name not in MATRICES:
            raise Unreadable(f"{name} is not known")
        rows: list[Node] = []
        while self.next.kind != "end":
            cells = [self.sum()]
            while self.is_next("&"):
                self.take()
                cells.append(self.sum())
            rows.append(Node("row", tuple(cells)))
            if not self.is_next("\\\\"):
                break
            self.take()
        end = self.take()
        if end.kind != "end" or end.text != name or len({len(row.parts) for row in rows}) != 1:
            raise Unreadable("rows of a matrix are of different lengths, or it does not end")
        return Node("det" if name == "vmatrix" else "matrix", tuple(rows))

    # Units

    def _unit(self) -> str | None:
        """Takes a unit that stands here and ends the item, and returns it; else returns None."""
        at, words = self._at, [CURRENCIES[self.take().text]] if self.is_next(*CURRENCIES) else []
        while self.next.kind in ("text", "letters") and (word := self._unit_word()) is not None:
            words.append(word)
            if self.is_next("^") and self.peek().text in ("2", "3"):
                self._at += 1
                words.append(f"^{self.take().text}")
            elif self.is_next("^") and self.peek().text == "{" and self.peek(2).text in ("2", "3"):
                words.append(f"^{self.peek(2).text}")
                self._at += 4
            if self.is_next("/") and self.peek().kind in ("text", "letters"):
                self.take()
                words.append("per")
        if words and self.next.text not in ENDS and not self._is_word("and", "or") and self.next is not _END:
            words = []
        if not words:
            self._at = at
        return " ".join(words) if words else None

    def _unit_word(self) -> str | None:
        token = self.next
        words = token.text.lower().replace(".", "").replace("-", " ").replace("/", " per ").split()
        if token.kind == "letters":
            known = all(word in UNITS or word in MULTIPLES for word in words) and len(token.text) > 1
        else:
            known = bool(words) and not any(w in NOT_UNITS and w not in MULTIPLES for w in words)
            known = known and name_in_text(token.text) is None and all(w.isalpha() or w == "%" for w in words)
        if not known:
            return None
        self.take()
        return " ".join(_singular(word) for word in words)


def _singular(word: str) -> str:
    return "percent" if word == "%" else CANONICAL.get(word, {"sq": "square", "cu": "cubic"}.get(word, word))
