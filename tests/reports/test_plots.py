"""Pictures that read on a light and on a dark page, for those who see no colours too."""

from __future__ import annotations

import re

from psannlm.reports.plots import Curve, draw_curves


def test_a_dark_page_gets_no_light_ground_and_curves_differ_by_more_than_colour() -> None:
    curves = [Curve(name, [1, 2, 3], [3.0, 2.0, level]) for name, level in (("a", 1.0), ("$b$", 1.5))]
    picture = draw_curves("x.png", curves, "tokens seen", "loss (nats per token)", "")
    assert set(picture.forms) == {(narrow, dark) for narrow in (False, True) for dark in (False, True)}
    for (_, is_dark), content in picture.forms.items():
        drawing = content.decode()
        assert not re.search(r"fill: (?:#f{3,6}|white)", drawing)
        assert ("#dfe3e6" in drawing) == is_dark
    shapes = re.findall(
        r'<path id="(m[0-9a-f]+)" d="([^"]+)"[^>]*style="stroke: #(?:0072b2|d55e00)',
        picture.forms[False, False].decode(),
    )
    assert len({path for _, path in shapes}) == 2, "each curve has a marker of its own"
