"""Coverage-guided fuzzing of the intakes: any bytes become an admitted object or one ``BshubError``.

``targets.py`` has one function per intake; ``python -m fuzz`` in ``tests/`` lets atheris drive them.
"""
