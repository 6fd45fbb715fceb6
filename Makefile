PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench notebook-test clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt ruff
	touch $@

.venv/notebook: .venv/installed
	$(BIN)/python -m pip install --quiet ipykernel nbclient
	touch $@

demo: .venv/installed
	$(BIN)/python unet_nuclei.py --boundary --data synthetic --width 16 --epochs 10 --out runs/demo

test: .venv/installed
	$(BIN)/python -m pytest -q test_unet_nuclei.py

lint: .venv/installed
	$(BIN)/ruff check --line-length 130 --select E,F,W,I,B --ignore B905 .

bench: .venv/installed
	$(BIN)/python test_unet_nuclei.py bench

notebook-test: .venv/notebook
	$(BIN)/python -m pytest -q test_unet_nuclei.py -k notebook -rs

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache __pycache__
