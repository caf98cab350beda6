//! Parses the command line, runs the command, turns its result into an exit code.

#![forbid(unsafe_code)]

use std::{io::Write as _, process::ExitCode};

use clap::Parser as _;
use hooktrail::cli::{self, Cli, Failed};

/// The least number of the runtime's threads. A receiver that floods its connection, with 1xx
/// answers say, keeps a thread busy for as long as a hundred reads take: as many of them as there
/// are threads would hold up every other subscriber. The system shares the cores among threads
/// fairly, so there are more threads than cores.
const WORKERS: usize = 8;

fn main() -> ExitCode {
    match cli::completed() {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        Err(why) => return fail(&Failed::Usage(why)),
    }
    // One TLS stack for broker and receivers; whoever connects first expects it to be there.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        unreachable!("nothing was installed before the first line of main");
    }
    let cli = Cli::parse();
    let workers = std::thread::available_parallelism().map_or(WORKERS, |n| n.get().max(WORKERS));
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => return fail(&Failed::Runtime(format!("the runtime does not start: {e}"))),
    };
    let ended = runtime.block_on(cli.run());
    // All that counts is done. What is left of it ends with the process: a runtime that is dropped
    // cancels tasks, and the thread of a connection to the broker that was not closed yet panics
    // over its own.
    std::mem::forget(runtime);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => fail(&failed),
    }
}

fn fail(failed: &Failed) -> ExitCode {
    // A reader of the log that hangs must not hold up the end of the daemon.
    if !matches!(failed, Failed::Logged(_)) {
        // Nor does one that has left change the exit code.
        writeln!(std::io::stderr(), "{failed}").ok();
    }
    ExitCode::from(failed.exit_code())
}
