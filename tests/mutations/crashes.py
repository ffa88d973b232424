"""Files that are written, and what killed processes left."""

from tests.mutants import Mutation

ATOMIC = "tests/test_atomic.py"
MUTATIONS = [
    Mutation(
        "what the dead left stays",
        f"{ATOMIC}::test_a_write_of_a_new_process_sweeps_by_itself",
        "io/temporary.py",
        "        sweep(path.parent)\n",
        "",
    ),
    Mutation(
        "what the living write is swept",
        f"{ATOMIC}::test_a_writer_that_lives_keeps_its_files_and_one_that_was_killed_does_not",
        "io/temporary.py",
        "return now is None or start not in (0, now)",
        "return True",
    ),
    Mutation(
        "a later process of the same number keeps what an earlier one left",
        f"{ATOMIC}::test_a_later_process_with_the_same_number_is_another_one",
        "io/temporary.py",
        "return now is None or start not in (0, now)",
        "return now is None",
    ),
    Mutation(
        "a folder that was moved aside is deleted, although its successor never came",
        f"{ATOMIC}::test_a_folder_that_was_moved_aside_comes_back_unless_its_successor_came[False]",
        "io/temporary.py",
        "if old and not os.path.lexists(target):",
        "if False:",
    ),
    Mutation(
        "a file gets its name before it is on the disk",
        f"{ATOMIC}::test_what_gets_a_name_is_on_the_disk_before",
        "io/atomic.py",
        "            flush_to_disk(temporary)\n            os.replace(temporary, place)\n",
        "            os.replace(temporary, place)\n            flush_to_disk(place)\n",
    ),
    Mutation(
        "a new name is not on the disk",
        f"{ATOMIC}::test_what_gets_a_name_is_on_the_disk_before",
        "io/atomic.py",
        "        flush_to_disk(place.parent)  # makes the new name durable, too\n",
        "",
    ),
    Mutation(
        "a folder that is deleted is half there after a kill",
        f"{ATOMIC}::test_a_removal_that_is_cut_short_leaves_no_half_folder",
        "io/atomic.py",
        "shutil.rmtree(gone, ignore_errors=True)",
        "os.rename(gone, path)",
    ),
    Mutation(
        "a link is replaced by a file",
        f"{ATOMIC}::test_a_link_stays_and_what_it_leads_to_is_replaced[atomic_write]",
        "io/atomic.py",
        "return Path(os.path.realpath(path))",
        "return path",
    ),
    Mutation(
        "readers lock each other out",
        f"{ATOMIC}::test_readers_share_a_lock_and_a_writer_waits_for_them",
        "io/locks.py",
        "fcntl.LOCK_SH if shared else fcntl.LOCK_EX",
        "fcntl.LOCK_EX",
    ),
    Mutation(
        "a shard that was read in the tick of its last change is not hashed again",
        "tests/store/test_damage.py::test_a_change_within_the_tick_of_a_coarse_clock_is_seen",
        "engine/store/directory.py",
        "if time.time_ns() - state[2] > COARSE:",
        "if True:",
    ),
    Mutation(
        "norms of U are forgotten where its kernel is read",
        "tests/study/test_kept.py::test_a_run_that_was_stopped_after_some_answers_has_the_bits_of_one_that_was_not",
        "study/kept.py",
        "if own is not None and answer.written is not None:",
        "if False:",
    ),
    Mutation(
        "the step by which an earlier run is known is moved first",
        "tests/record/test_loop.py::test_an_earlier_run_is_set_aside_whole_however_often_that_is_stopped[4]",
        "record/resuming.py",
        "for later in reversed(numbered(directory, STEPS)):",
        "for later in numbered(directory, STEPS):",
    ),
    Mutation(
        "states of another run are taken for this one's",
        "tests/record/test_replay.py::test_states_of_another_run_are_not_taken_for_this_ones",
        "record/restored.py",
        "if self._found() != self._of:",
        "if False:",
    ),
    Mutation(
        "a disk that turned read-only is a raw error where results are replaced",
        "tests/torture/test_disks.py::test_results_on_a_disk_that_turned_read_only_stay",
        "study/sealed.py",
        "remove_file(directory / RECORD)",
        "(directory / RECORD).unlink(missing_ok=True)",
    ),
]
