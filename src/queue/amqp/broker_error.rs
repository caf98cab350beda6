//! The broker's answers to requests that it did not carry out.

use std::{fmt, time::Duration};

use lapin::ErrorKind;
use tokio::time::timeout;

/// Timeout of one request that the broker should answer at once.
pub(super) const RPC_TIMEOUT: Duration = Duration::from_secs(20);

/// The broker's answer to a request that it did not carry out, or its silence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BrokerError {
    /// The AMQP reply code.
    pub(super) code: Option<u16>,
    /// The broker did not answer in time.
    pub(super) silent: bool,
    pub(super) text: String,
}

/// Reply code with which the broker closes a connection over a queue that it cannot use any more.
pub(super) const INTERNAL_ERROR: u16 = 541;
pub(super) const NOT_FOUND: u16 = 404;
/// Reply code: another connection has the queue exclusively.
pub(super) const RESOURCE_LOCKED: u16 = 405;

impl From<&lapin::Error> for BrokerError {
    /// Takes over the broker's words, without the URL.
    fn from(e: &lapin::Error) -> Self {
        match e.kind() {
            ErrorKind::ProtocolError(e) => Self {
                code: Some(e.get_id()),
                silent: false,
                text: format!("{} ({})", e.get_message(), e.get_id()),
            },
            ErrorKind::IOError(e) => Self { code: None, silent: false, text: e.to_string() },
            ErrorKind::MissingHeartbeatError => {
                Self { code: None, silent: false, text: "the broker sent no heartbeat".to_owned() }
            }
            _ => Self { code: None, silent: false, text: e.to_string() },
        }
    }
}

impl From<lapin::Error> for BrokerError {
    fn from(e: lapin::Error) -> Self {
        Self::from(&e)
    }
}

impl fmt::Display for BrokerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Waits for the broker's answer to a request, for at most [`RPC_TIMEOUT`]: a queue without a
/// leader never answers, and lapin waits indefinitely.
///
/// # Errors
/// The broker refused, or did not answer.
pub(super) async fn answer<T>(
    request: impl Future<Output = lapin::Result<T>>,
) -> Result<T, BrokerError> {
    match timeout(RPC_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(BrokerError::from),
        Err(_) => Err(BrokerError {
            code: None,
            silent: true,
            text: format!("the broker did not answer within {} s", RPC_TIMEOUT.as_secs()),
        }),
    }
}
