"""The notebooks: `*.py` (percent format) is what is edited, `*.ipynb` is written from it, without outputs.

    python colab/pairs.py                               write every .ipynb
    python colab/pairs.py --repository owner/name       and have them and the README name this GitHub repository

Notebooks are kept without outputs: pictures would make every change unreadable, and would be as old as the last run by
hand. The tests execute them.
"""

import argparse
import re
from pathlib import Path

import jupytext
import nbformat

COLAB = Path(__file__).parent
REPOSITORY = re.compile(r"git clone .*github\.com/([\w.-]+/[\w.-]+)")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(script: Path) -> str:
    """The text of the .ipynb half, the same whenever it is written."""
    cells = jupytext.read(script).cells
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:02}"
    whole = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL, "colab": {"provenance": []}})
    return nbformat.writes(whole) + "\n"


def main() -> None:
    """Writes the notebooks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", help="owner/name on GitHub")
    args = parser.parse_args()
    scripts = sorted(COLAB.glob("[0-9]*.py"))
    if args.repository:
        (former,) = {name for script in scripts for name in REPOSITORY.findall(script.read_text())}
        for path in [COLAB.parent / "README.md", *scripts]:
            path.write_text(path.read_text().replace(former, args.repository))
    for script in scripts:
        script.with_suffix(".ipynb").write_text(notebook(script))


if __name__ == "__main__":
    main()
