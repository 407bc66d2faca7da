"""The published benchmark's command line: `python server.py --num_iters 100 --batch_size 32 --no-compile ...`.

It measures the published server's final design (or another with --design) and appends one row to results/output.csv.
`headrace bench --help` shows all that Headrace can do beyond it.
"""

from headrace.cli import main_published

if __name__ == "__main__":
    main_published()
