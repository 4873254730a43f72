"""Tasks by name, imported when asked for."""

TASKS: dict[str, str] = {
    "arithmetic": "potstill.tasks.arithmetic:Arithmetic",
    "jsonl": "potstill.tasks.jsonl:Jsonl",
    "hub": "potstill.tasks.hub:Hub",
    "reasoning_gym": "potstill.tasks.reasoning_gym:ReasoningGym",
}
"""name -> "module:Class", the `kind` of a task in a recipe."""
