"""Programs that attack the way between a program and the tests that are Python text: names, objects, the protocol.

As `attacks.ON_GRADER`: each wants a point without solving the task, which is that f(3) is 918273.
"""

from __future__ import annotations

ON_TESTS: dict[str, str] = {
    "number_that_lies_by_and_by": """
import sys
lies = iter([10 ** 9, 0, -1, 1] * 9)
frame = sys._getframe()
while frame:
    for name in ("base_value", "base_of"):
        if name in frame.f_globals: frame.f_globals[name] = lambda value: next(lies) if name == "base_value" else int
    frame = frame.f_back
class Liar(int):
    def __index__(self): return next(lies)
    __int__ = __float__ = __hash__ = __index__
def f(x): return Liar(1)
""",
    "everything_that_is_asked_of_a_type": """
class Liar(int):
    def yes(self, *a): return True
    __eq__ = __ge__ = __le__ = __contains__ = __bool__ = __gt__ = __lt__ = yes
    def __ne__(self, other): return False
    def itself(self, *a): return self
    __sub__ = __rsub__ = __add__ = __radd__ = __abs__ = __neg__ = __round__ = __getattr__ = __call__ = itself
    def __hash__(self): return 918273
    def __iter__(self): return iter([self, True])
    def __len__(self): return 1
    __class__ = property(lambda self: Liar)
def f(x): return Liar(1)
""",
    "shadowed_built_ins": "def abs(x): return 0\ndef f(x): return 0\nstr = int = set = float = round = abs",
    "alias_of_the_failure": "AssertionError = Exception = BaseException\ndef f(x): return 0",
    "changed_arguments": "def f(x):\n    if hasattr(x, 'clear'): x.clear()\n    return x",
    "forged_object": """
import json, os
equal = {"exception": ["builtins:type", "X", {"tuple": []}, {"dict": [["__eq__", {"known": "builtins:bool"}]]}]}
kind = {"class": 1, "name": "g", "bases": [], "special": ["__call__"], "base": None}
lines = [["f"], {"object": 0, "class": kind}, {"exception": ["operator:call", equal]}]
for fd in range(3, 20):
    for line in lines:
        try: os.write(fd, json.dumps({"value": line}).encode() + b"\\n")
        except OSError: pass
""",
    "forged_values": """
import os
lines = [b'{"value": ["f"]}', b'{"value": {"known": "unittest.mock:ANY"}}', b'{"value": {"known": "builtins:eval"}}',
         b'{"value": {"object": 1, "class": {"class": 2, "name": "A", "bases": [], "special": ["__eq__", "__ne__"]}}}',
         b'{"value": {"same": 0}, "changed": [[0, [1]], [-1, [2]]]}', b'{"raised": {"known": "builtins:SystemExit"}}',
         b'{"back": "call", "theirs": 0, "args": [], "kwargs": {}}', b'{"missing": true}', b'{}']
for fd in range(3, 20):
    for line in lines:
        try: os.write(fd, line + b"\\n")
        except OSError: pass
def f(x): return 0
""",
}
