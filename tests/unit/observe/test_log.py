import logging

import pytest

from moe_trainer.observe.log import get_logger, setup_logging


@pytest.fixture(autouse=True)
def untouched_logger():
    logger = logging.getLogger("moe_trainer")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def test_rank_0_speaks_plainly_and_once(capsys):
    setup_logging(0)
    setup_logging(0)
    get_logger("moe_trainer.train.trainer").info("step %d", 3)
    get_logger("script").debug("not this")
    assert capsys.readouterr() == ("", "step 3\n")


def test_other_ranks_only_warn_and_say_who_they_are(capsys):
    setup_logging(3)
    get_logger("script").info("not this")
    get_logger("script").warning("but this")
    assert capsys.readouterr().err == "[rank 3] WARNING: but this\n"
