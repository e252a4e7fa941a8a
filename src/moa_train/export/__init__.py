"""Export trained weights to files that work without moa-train: ``moa-export``, docs/EXPORT.md.

Every format is a module with three functions:

    def check(config: ExportConfig) -> None           raise UserError if a setting or library is missing
    def write(subject: Subject, path: Path) -> dict   write the file or folder, and return what the report adds
    def load(path: Path, config: ExportConfig) -> Runner   open it as its users do

`job.export` writes to a temporary path, loads the result, compares it with the checkpoint on real images, and only then
moves it to its final place.
"""
