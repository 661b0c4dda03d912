"""
User input about videos: prompts, the pictures for them, and the tables that give each video its prompt.

Text files are UTF-8, with or without a byte order mark, and split at line feeds only. Anything wrong raises ValueError
with the file and the line.
"""
import csv
import hashlib
import os
import re
from codecs import BOM_UTF8
from pathlib import Path

from data import file_inside, read_jsonl
from video import look_at

# What other trainers' metadata calls them; `file_name` is the name in Hugging Face's folders of videos.
VIDEO_COLUMNS = ("video", "file_name", "file_path", "video_path", "path")
PROMPT_COLUMNS = ("prompt", "text", "caption", "cap")
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".flv",
                  ".gif", ".ogv", ".wmv", ".asf", ".3gp"}


# ---------------------------------------------------------------------------------------------------------------------
# prompts

def check_text(where, text):
    """ValueError unless the text, of an argument or a file's name, can be written as UTF-8."""
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {str(text)!r:.200} is not UTF-8 ({error.reason}), as all text in samples is; "
                         "write it in UTF-8, or rename the file") from error


def read_lines(path):
    """Yield (file:line, text) of a text file in UTF-8, with or without a byte order mark, split at line feeds only."""
    content = Path(path).read_bytes().removeprefix(BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            yield f"{path}:{number}", line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error}); save the file as UTF-8") from error


def looks_like_path(text):
    """
    Whether an argument looks like a path rather than a prompt: it exists, or is one word with a slash or a suffix.
    """
    one_word = text.isascii() and len(text.split()) == 1
    return os.path.exists(text) or one_word and ("/" in text or re.search(r"\w\.[A-Za-z]\w{1,4}$", text) is not None)


def read_prompts(arguments):
    """
    The prompts that --prompts gives: each argument is a prompt, or a .txt file with a prompt a line; blank lines are
    ignored.

    ValueError for a file that is missing, empty or named twice, and for another path, which is not a prompt.
    """
    prompts, files = [], set()
    for argument in arguments:
        check_text("--prompts", argument)
        if not argument.lower().endswith(".txt"):
            if looks_like_path(argument):
                raise ValueError(f"--prompts {argument}: this looks like a path; expected prompts or .txt files (if it "
                                 "is a prompt, write it into a .txt file)")
            prompts.append(argument)
            continue
        if not os.path.isfile(argument):
            raise ValueError(f"--prompts {argument}: no such file; expected a .txt file with a prompt a line")
        if Path(argument).resolve() in files:
            raise ValueError(f"--prompts {argument}: named twice; name it once, or repeat its lines in the file")
        files.add(Path(argument).resolve())
        lines = [line.strip() for _, line in read_lines(argument) if line.strip()]
        if not lines:
            raise ValueError(f"--prompts {argument}: the file has no line with a prompt")
        prompts += lines
    return prompts


def name_samples(prompts, per_prompt, name_by):
    """
    The samples to make from prompts, as (stem of its file, number of its prompt, its number among those of the prompt):

        number      00000, 00001, ...; with several of a prompt 00000-0, 00000-1, ...
        prompt      PROMPT-0, PROMPT-1, ..., the names of VBench
        prompt180   the same with the first 180 characters of the prompt, the names of VBench-2.0

    Where files are named by prompt, a repeated prompt is made once. ValueError for a prompt that cannot be a file's
    name, and for two with one name.
    """
    numbers = {}    # name of a prompt: its number
    for number, prompt in enumerate(prompts):
        if name_by == "number":
            name = f"{number:05d}"
        else:
            name = prompt[:180] if name_by == "prompt180" else prompt
            check_file_name(f"{name}-{per_prompt - 1}.safetensors", name_by)
        earlier = numbers.setdefault(name, number)
        if prompts[earlier] != prompt:
            raise ValueError(f"--name_by {name_by}: two prompts begin with {name!r}; take --name_by prompt or number")
    if name_by == "number" and per_prompt == 1:
        return [(name, number, 0) for name, number in numbers.items()]
    return [(f"{name}-{i}", number, i) for name, number in numbers.items() for i in range(per_prompt)]


def check_file_name(file, name_by):
    """ValueError unless a file of samples, named by its prompt, can have this name."""
    problem = ""
    if re.search(r"[/\x00-\x1f\x7f]", file):
        problem = "no file's name has a slash, a line feed or another control character"
    elif file.startswith((".", "-")):
        problem = "a prompt that is empty or begins with a dot or a minus cannot be a name"
    elif len(file.encode()) > 255:
        problem = f"it takes {len(file.encode())} bytes, and a file's name has at most 255"
    if problem:
        raise ValueError(f"--name_by {name_by}: the file would be {file!r:.300}: {problem}; change the prompt, or take "
                         "--name_by number")


def image_files(args, config, count):
    """
    The pictures that --image and --last_image give, as (first, last) for each of `count` prompts, "" where the model of
    config needs none. ValueError for pictures that the model does not take, and for missing ones.
    """
    kind = config.model_type
    columns = []
    for flag, files, taken_by, needed_by in (("--image", args.image, ("i2v", "flf2v", "ti2v"), ("i2v", "flf2v")),
                                             ("--last_image", args.last_image, ("flf2v",), ("flf2v",))):
        if files and kind not in taken_by:
            raise ValueError(f"{flag}: {args.init} is a {kind} model, takes no picture; only {', '.join(taken_by)} do")
        if not files and kind in needed_by:
            raise ValueError(f"{flag} is missing: {args.init} is a model of type {kind} and needs it for every video")
        if len(files) not in (0, 1, count):
            raise ValueError(f"{flag}: {len(files)} pictures for {count} prompts; expected one, or one for each")
        for file in files:
            if not Path(file).is_file():
                raise ValueError(f"{flag} {file}: no such file")
        columns.append(files if len(files) == count else (files or [""]) * count)
    return list(zip(*columns))


# ---------------------------------------------------------------------------------------------------------------------
# tables: which videos, which prompts

def read_metadata(folder, skip_damaged=False):
    """
    List of (file:line, video file, prompt), one per video.

    Every row and every video of the folder is accounted for; ValueError names the one that is not. Other files are
    ignored; with skip_damaged, so are unreadable videos without a row.
    """
    folder = Path(folder)
    table = find_table(folder)
    rows = []
    row_of = {}                                                       # real path of a video: where its row is
    for where, row in read_jsonl(table) if table.suffix == ".jsonl" else read_csv(table):
        name, prompt = read_row(where, row)
        path = file_inside(folder, name, where)
        earlier = row_of.setdefault(path.resolve(), where)
        if earlier != where:
            raise ValueError(f"{where}: {name} is in {earlier} already; expected one row per video")
        rows.append((where, path, prompt))
    if not rows:
        raise ValueError(f"{table}: no rows; expected one per video, with video and prompt")
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path != table and path.resolve() not in row_of:
            try:
                look_at(path)
            except ValueError:
                if path.suffix.lower() not in VIDEO_SUFFIXES or skip_damaged:
                    continue                                          # notes, Thumbs.db, ...: not a video
                raise
            raise ValueError(f"{path}: a video without a row in {table}; add one, or move the file out of --videos")
    return rows


def find_table(folder):
    if not folder.is_dir():
        raise ValueError(f"--videos {folder}: no such folder")
    tables = [path for path in (folder / "metadata.jsonl", folder / "metadata.csv") if path.is_file()]
    if len(tables) != 1:
        got = "both metadata.jsonl and" if tables else "no metadata.jsonl or"
        raise ValueError(f"--videos {folder}: {got} metadata.csv in it; "
                         "expected one of them, with columns video and prompt")
    return tables[0]


def first_of(row, columns):
    """The first of these columns that a row has, or None."""
    return next((row[column] for column in columns if row.get(column) is not None), None)


def read_row(where, row):
    """The video's file name and the prompt in a row of the table."""
    name = first_of(row, VIDEO_COLUMNS)
    prompt = first_of(row, PROMPT_COLUMNS)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: no video; expected a column `video` with a file name "
                         f"(also read: {', '.join(VIDEO_COLUMNS[1:])}); the row has {sorted(map(str, row))}")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: no prompt for {name}; expected text in a column `prompt` "
                         f"(also read: {', '.join(PROMPT_COLUMNS[1:])})")
    check_text(where, name)
    check_text(where, prompt)
    return name, prompt


def read_csv(path):
    """
    List of ("file:line", dict), like data.read_jsonl. A quote inside a quoted cell is doubled, as in Excel's files.
    """
    rows = []
    columns = None
    line = 0                                                          # the last one read
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            for cells in reader:
                where, line = f"{path}:{line + 1}", reader.line_num
                if not cells:                                         # a blank line
                    continue
                if columns is None:
                    columns = cells
                    if len(set(columns)) < len(columns):
                        raise ValueError(f"{where}: two columns of one name among {columns}")
                    continue
                check_cells(where, cells, columns)
                rows.append((where, dict(zip(columns, cells))))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a CSV table in UTF-8 after line {line} ({error})") from error
        except csv.Error as error:
            raise ValueError(f"{path}: not a CSV table in UTF-8 after line {line} ({error}); see {path}:{line + 1}: "
                             'in a quoted cell a quote is doubled (not \\"), and every quote is closed') from error
    return rows


def check_cells(where, cells, columns):
    """Raises ValueError for a row with more cells than columns, or one that has swallowed the rows after it."""
    if len(cells) > len(columns):
        raise ValueError(f"{where}: {len(cells)} cells, but the table has {len(columns)} columns "
                         f"({', '.join(columns)}); a cell with a comma in it needs quotes around it")
    suffixes = {Path(cell).suffix.lower() for cell in cells} & VIDEO_SUFFIXES
    for cell in cells:
        for later_line in cell.splitlines()[1:]:
            names = [name.strip(' "') for name in later_line.split(",")]
            if any(Path(name).suffix.lower() in suffixes for name in names):
                raise ValueError(f"{where}: a cell does not end with its line and takes in {later_line!r:.80}; "
                                 "a quote is not closed")


def stem_of(path, folder):
    """
    A file name for the samples of a video, safe anywhere: letters, digits, _ and -.

    Where that changed the name, a hash of it is added, so that no two videos share one.
    """
    name = path.relative_to(folder).with_suffix("").as_posix()
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:80]
    if safe == name:
        return safe
    return f"{safe}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"
