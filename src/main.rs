//! Parses the command line, runs the command, turns its result into an exit code.

#![forbid(unsafe_code)]

use std::{io::Write as _, process::ExitCode};

use clap::Parser as _;
use hooktrail::cli::{self, Cli, Failed};

/// The least number of the runtime's threads. A receiver that floods its connection, for example
/// with 1xx answers, keeps a thread busy for as long as a hundred reads take. As many of them as
/// there are threads would hold up every other subscriber. The system shares the cores among
/// threads fairly, so there are more threads than cores.
const WORKERS: usize = 8;

fn main() -> ExitCode {
    match cli::completed() {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        Err(why) => return fail(&Failed::Usage(why)),
    }
    // One TLS stack for broker and receivers; the first connection needs it.
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
    // Everything durable is done, and the rest ends with the process. A runtime that is dropped
    // would cancel tasks, and the thread of a broker connection that is still open would panic.
    std::mem::forget(runtime);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => fail(&failed),
    }
}

fn fail(failed: &Failed) -> ExitCode {
    // A hanging reader of the log must not delay the end of the daemon.
    if !matches!(failed, Failed::Logged(_)) {
        // A reader that has left must not change the exit code.
        writeln!(std::io::stderr(), "{failed}").ok();
    }
    ExitCode::from(failed.exit_code())
}
