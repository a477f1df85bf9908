"""
Builds a few AppWorld tasks with AppWorld's own classes, so that its real server can be tested without its data.

Run by the Python of AppWorld's environment, with the directory to write to: `python appworld_tasks.py ROOT`.

- `notes_1`: a change of state. "Create a note titled 'Groceries' with the content 'milk'."
- `notes_2`: a question. "What is the content of my note titled 'Door code'?" (4711)
"""

import json
import os
import sys
from pathlib import Path
from textwrap import dedent


PASSWORD = "correct-horse"

EVALUATION = """
def evaluate(test, public_data, private_data, main_user, models, ground_truth_answer):
    predicted_answer = models.end.supervisor.Task.first().answer
    predicted_answer = json.loads(predicted_answer)
    with test('''the answer is right'''):
        test.answer(predicted_answer, ground_truth_answer)
    with test('''only the notes have changed, and only where the task asks for it'''):
        test.case(models.changed_model_names(), "==", set(public_data.changed))
    with test('''the note was written as the task says'''):
        added, _, _ = models.changed_records("simple_note.Note")
        test.case([[note.title, note.content] for note in added], "==", [list(note) for note in public_data.added])
"""


def build(root: Path) -> None:
    """
    Write the data directory of AppWorld with the tasks.

    Args:
        root (`Path`):
            AppWorld's root directory; it gets a directory `data`.
    """
    import appworld.ground_truth
    from appworld import update_root
    from appworld.apps import get_all_apps
    from appworld.apps.admin.models import MainUserMunch
    from appworld.collections.api_docs import ApiDocCollection
    from appworld.collections.models import ModelCollection
    from appworld.common.constants import CANARY_STRING, DB_VERSION
    from appworld.common.datetime import DateTime
    from appworld.ground_truth import GroundTruth
    from appworld.task import Task

    update_root(str(root))
    # it only formats what it writes, by a program that is not among its dependencies
    appworld.ground_truth.run_ruff = lambda *args, **kwargs: None

    docs = ApiDocCollection.build(tuple(get_all_apps(skip_admin=True)))
    for app, apis in docs.items():
        path = root / "data" / "api_docs" / "standard" / f"{app}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({name: {**doc, "canary_string": CANARY_STRING} for name, doc in apis.items()}))

    apps = get_all_apps()
    tasks = {
        "notes_1": (
            "Create a note titled 'Groceries' with the content 'milk'.",
            None,
            {"changed": ["simple_note.Note"], "added": [["Groceries", "milk"]]},
            1,
        ),
        "notes_2": (
            "What is the content of my note titled 'Door code'?",
            "4711",
            {"changed": [], "added": []},
            2,
        ),
    }
    for task_id, (instruction, answer, public_data, difficulty) in tasks.items():
        home = f":memory:task_input-{task_id}"
        models = ModelCollection.load(to_db_home_path=home, load_apps=apps, create_db=True)
        person = {"first_name": "Ada", "last_name": "Lee", "email": "ada@example.com"}
        details = {**person, "phone_number": "5550100000", "birthday": "1990-01-01", "sex": "female"}
        models.admin.MainUser.create_save(**details)
        supervisor = models.supervisor.Supervisor.create_save(**details)
        models.supervisor.AccountPassword.create_save(
            supervisor_id=supervisor.id, account_name="simple_note", password=PASSWORD
        )
        models.supervisor.Task.create_save(supervisor_id=supervisor.id, instruction=instruction)
        user = models.simple_note.User.create_save(**person, password=PASSWORD, verified=True)
        models.simple_note.Note.create_save(user_id=user.id, title="Door code", content="4711", pinned=False)
        for app in ("simple_note", "supervisor", "api_docs"):
            for doc in docs[app].values():
                fields = {key: value for key, value in doc.items() if key != "app_name"}
                models.api_docs.ApiDoc.create_save(app_name_=app, **fields)
        task = Task(
            id=task_id,
            instruction=instruction,
            supervisor=MainUserMunch.from_supervisor(supervisor),
            datetime=DateTime(2023, 5, 18, 12, 0, 0),
            allowed_apps=get_all_apps(skip_admin=True),
            db_version=DB_VERSION,
            model_collection=models,
        )
        requirements = ("the answer is right",) + (
            "only the notes have changed, and only where the task asks for it",
            "the note was written as the task says",
        )
        task.ground_truth = GroundTruth(
            task_id=task_id,
            required_apps=["simple_note"],
            public_data=public_data,
            private_data={},
            answer=answer,
            evaluation_code="import json\n" + dedent(EVALUATION),
            solution_code="def solution(apis, requester):\n    pass\n",
            compiled_solution_code="def solution(apis, requester):\n    pass\n",
            generator_code="",
            test_data=[{"requirement": requirement, "label": "no_op_fail"} for requirement in requirements],
            metadata={"difficulty": difficulty, "mode": "minimal", "num_solution_code_lines": 1},
        )
        task.save()
        task.close()

    datasets = root / "data" / "datasets"
    datasets.mkdir(parents=True)
    (datasets / "train.txt").write_text("notes_1\nnotes_2\n")
    (datasets / "dev.txt").write_text("notes_2\n")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # without this, AppWorld's threads outlive the script
