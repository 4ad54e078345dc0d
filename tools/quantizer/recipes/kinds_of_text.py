# ruff: noqa: RUF001 - other scripts are meant as they are
"""Short texts of many kinds, which widen what is known of K and V beyond the user's own texts.

A calibration file tends to hold one kind of text, and a served model reads all kinds. Keys reach
furthest at what marks a kind: line breaks and indents, brackets, signs, rules of many equal
characters, other scripts. Nothing is chosen by these texts; they only show how far rows may reach.
"""

from kvc8.tools.quantizer.calibration_data import Text

CHAT = """\
user: What is the difference between a list and a set? And when would you use which?
assistant: Good question! A list keeps its order; a set does not, and holds each item once.

1. **Lists**: order matters, or things repeat.
2. **Sets**: you only ask "is it there?"
   - fast membership tests
   - unions & intersections

| kind | ordered | repeats | cost of `in` |
|------|:-------:|--------:|--------------|
| list | yes     | yes     | O(n)         |
| set  | no      | no      | O(1)         |

> Don't guess -- measure. (See https://example.org/faq?id=7#sets or mail to help@example.org.)

### Summary
Use a `set` for 10,000+ lookups; otherwise, it won't matter...
"""
PYTHON = '''\
#!/usr/bin/env python3
import os, sys
from collections import defaultdict

class Inventory(dict):
    """Counts of parts, by name."""

    LIMIT = 0x7F

    def __init__(self, *args, path=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.path = path or os.getcwd()
        self._seen = defaultdict(lambda: [0.0, -1.5e-3])

    @property
    def total(self) -> int:
        return sum(v for k, v in self.items() if not k.startswith("_"))

    def take(self, name, n=1):
        if n <= 0 or self.get(name, 0) < n:
            raise ValueError(f"{name!r}: only {self.get(name)} left, {n:>4d} wanted")
        for i in range(n):
            try:
                self[name] -= 1   # one by one
            except (KeyError, TypeError) as e:
                print("oops:", e, file=sys.stderr)
                continue
            finally:
                self._seen[name][0] += 1
        return self[name] == 0 and True or None

if __name__ == '__main__':
    x = Inventory({"bolt": 12, 'nut': 3}, path="parts/a.txt")
    while x.total > 0 and x["bolt"] % 5 != 1: x.take("bolt")
'''
FORMATS = """\
#include <stdio.h>
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Sums an array; returns -1 on NULL. */
static long sum(const int *v, size_t n)
{
\tlong s = 0;
\tif (!v) return -1;
\tfor (size_t i = 0; i < n; ++i) {
\t\ts += v[i] << 1;
\t}
\treturn s;   // done
}

const f = async (url) => { const r = await fetch(`${url}/x`); return r.ok ? r.json() : null; };

SELECT o.id, SUM(l.price * l.qty) AS total FROM orders o
  LEFT JOIN lines l ON l.order_id = o.id
 WHERE o.day BETWEEN '2019-01-01' AND '2019-12-31' GROUP BY o.id HAVING COUNT(*) > 2;

{"name": "pump-3", "tags": ["a", "b"], "limits": {"low": -12.5, "high": 80}, "ok": true}

<!DOCTYPE html>
<div class="row"><a href="/index.html">Home</a> &nbsp; <img src='x.png' alt="X"/></div>
<!-- end -->

server:
  - host: 10.0.0.12:8080
    retries: 3
"""
TERMINAL = r"""$ ls -la /var/log | grep -v total
drwxr-xr-x  2 root root   4096 Mar  3 09:14 apt
-rw-r-----  1 root adm  183204 Mar  3 10:02 syslog
2023-03-03 10:02:11,532 ERROR [worker-2] Timeout after 30000 ms (attempt 2/5): refused
Traceback (most recent call last):
  File "run.py", line 88, in <module>
ZeroDivisionError: division by zero
--- a/run.py
+++ b/run.py
@@ -86,3 +86,3 @@
-    return a / b
+    return a / b if b else 0
commit 9f8e7d6c5b4a3f2e1d0c
================================================================================
Chapter 4.   THE SECOND LAW
================================================================================
********** WARNING **********   ....................  17
    x^2 + y^2 = r^2,   \frac{a}{b} \le \sqrt{2\pi},   f(x) = \sum_{i=0}^{n} a_i x^i
    3.14159   2.71828   1,000,000   -40 %   $5.99   7/8   1e-10   192.168.0.1
Copyright (C) 2010. All rights reserved; "as is", WITHOUT WARRANTY OF ANY KIND.
"""
PROSE = """\
The rain had stopped. "Where," she asked, "did you leave it?"
"Nowhere!" he said -- too quickly -- and looked away. 'Tis so, they'd say; it isn't.

Roses are red,
Violets are blue;
Sugar is sweet,
And so are you.

Q: Who wrote it?   A) Mary   B) John   C) nobody   D) all of the above
Answer: C

Le chat s'est endormi sur la chaise, près de la fenêtre. Wie spät ist es? Es ist größer.
¿Dónde está la biblioteca? Não sei. Привет, как дела? Γειά σου. שלום. مرحبا بالعالم
今天天气很好, 我们去公园散步吧。これは本です。한국어도 있습니다. नमस्ते 🙂🚀 ½ × 3 ≠ 2 → ∞

NAME        QTY   PRICE
apple         3    1.20
pear         12    0.85
TOTAL        15   13.80
"""


def kinds_of_text() -> list[Text]:
    """One text of each kind, as if it were read from a file."""
    return [Text("kinds of text", text) for text in (CHAT, PYTHON, FORMATS, TERMINAL, PROSE)]
