//! What the system lets this process have: its file descriptors, ports and buffers. A lack of them is no receiver's failure.

use std::{
    io::Error,
    os::fd::AsFd as _,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

/// Between two lines of the log about it.
const QUIET: Duration = Duration::from_secs(60);

/// Raises the limit of open files to what the system allows this process. Many start with 1,024, which a few hundred
/// receivers use up. Returns the limit, or `None` if there is none.
pub fn raise_open_files() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum && setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_err() {
        return current;
    }
    maximum
}

/// What this process or its machine lacks, if that is what an error of a socket says.
pub fn lacking(e: &Error) -> Option<&'static str> {
    let errno = Errno::from_raw_os_error(e.raw_os_error()?);
    let what = match errno {
        Errno::MFILE => "this process has no file descriptor left (EMFILE): raise LimitNOFILE= of its unit, or `ulimit -n`",
        Errno::NFILE => "the system has no file descriptor left (ENFILE): raise fs.file-max",
        Errno::NOBUFS => "the system has no buffer left for a connection (ENOBUFS)",
        Errno::NOMEM => "the system has no memory left for a connection (ENOMEM)",
        Errno::ADDRNOTAVAIL => {
            "the system has no port left to connect from (EADDRNOTAVAIL): widen net.ipv4.ip_local_port_range, or let receivers \
             keep connections open"
        }
        _ => return None,
    };
    Some(what)
}

/// Whether no further file can be opened now. A resolver that could open no socket says no more than that it failed.
pub fn without_descriptors() -> Option<&'static str> {
    lacking(&std::io::stderr().as_fd().try_clone_to_owned().err()?)
}

/// Says it in the log, once a minute however many requests it concerns.
pub fn report(what: &str, now: Instant) {
    static REPORTED: Mutex<Option<Instant>> = Mutex::new(None);
    let mut reported = REPORTED.lock().unwrap_or_else(PoisonError::into_inner);
    if reported.is_none_or(|at| now.saturating_duration_since(at) >= QUIET) {
        *reported = Some(now);
        tracing::error!(error = what, "requests cannot be sent; they are no attempts, and their events wait in the queue");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_this_process_is_told_from_what_a_receiver_does() {
        for (errno, part) in [(Errno::MFILE, "EMFILE"), (Errno::NFILE, "ENFILE"), (Errno::ADDRNOTAVAIL, "EADDRNOTAVAIL")] {
            let what = lacking(&Error::from_raw_os_error(errno.raw_os_error())).expect("a lack");
            assert!(what.contains(part), "{what}");
        }
        for errno in [Errno::CONNREFUSED, Errno::CONNRESET, Errno::HOSTUNREACH, Errno::TIMEDOUT] {
            assert_eq!(lacking(&Error::from_raw_os_error(errno.raw_os_error())), None, "{errno}");
        }
        assert_eq!(lacking(&Error::other("EMFILE")), None);
    }

    #[test]
    fn the_limit_of_open_files_is_what_the_system_allows() {
        let most = getrlimit(Resource::Nofile).maximum;
        assert_eq!(raise_open_files(), most);
        assert_eq!(getrlimit(Resource::Nofile).current, most);
    }
}
