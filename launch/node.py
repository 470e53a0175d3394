"""What srun starts, once on each node of a SLURM job: the launcher of that node's processes.

srun --nodes 2 --ntasks-per-node 1 python launch/node.py --nodes 2 --processes 4 --address 10.0.0.1 --port 29500 RUN

slurm/train.sbatch does so, after `--create` has made the run of a recipe, or `--task` that of a search, and printed its
folder.
"""

import argparse
import os
import signal
import sys

if __name__ == "__main__":
    # a notice of the job's end waits from here on for those that it is for
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="RUN", help="the run's folder; with --create also a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")
    parser.add_argument("--create", action="store_true", help="make the run, print its folder and end")
    parser.add_argument("--task", type=int, help="draw and make this run of a search, print its folder and end")
    parser.add_argument("--run-dir", help="the folder of the run to make (default: runs/NAME)")
    parser.add_argument("--update", action="store_true", help="give an existing run the values of the recipe")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the job")
    parser.add_argument("--processes", default="auto", help="processes on each node; auto: one for each GPU, else one")
    parser.add_argument("--strategy", default="auto", help="single, ddp, zero1, zero2, zero3, fsdp2, or auto")
    parser.add_argument("--offload", default="auto", help="what to keep in the memory of the CPU: none, optimizer, all")
    parser.add_argument("--replicate", default="", help="replicas that fsdp2 makes: a number, or auto: one a machine")
    parser.add_argument("--address", default="", help="where the first node is reached")
    parser.add_argument("--port", type=int, default=0, help="where its launcher listens")
    parser.add_argument("--interface", help="the network interface between nodes")
    parser.add_argument("--scratch", help="a folder of the node's own")
    a = parser.parse_args()

    from distrain.config import UserError
    from distrain.launchers.slurm.node import create, start_node
    from distrain.system.output import echo_error, prepare_streams

    prepare_streams()
    common = {"nodes": a.nodes, "processes": a.processes}
    common |= {"strategy": a.strategy, "offload": a.offload, "replicate": a.replicate}
    try:
        if a.task is not None:
            from distrain.sweep.tasks import run_of_task

            drawn = run_of_task(a.target, a.task)
            sys.stdout.buffer.write((os.fsencode(drawn) if drawn is not None else b"none") + b"\n")
            sys.exit(0)
        if a.create:
            folder = create(a.target, a.overrides, run_dir=a.run_dir, update=a.update, **common)
            sys.stdout.buffer.write(os.fsencode(folder) + b"\n")  # for the script, which goes there
            sys.exit(0)
        place = {"address": a.address, "port": a.port, "interface": a.interface, "scratch": a.scratch}
        more = []
        if "DISTRAIN_PRUNES" in os.environ:  # a run of a search
            from distrain.sweep.tasks import callbacks_of_task

            more = callbacks_of_task()
        sys.exit(start_node(a.target, callbacks=more, **common, **place))
    except UserError as error:
        echo_error(error)
        sys.exit(1)
