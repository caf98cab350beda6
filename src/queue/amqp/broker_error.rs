//! What the broker said to a request that it did not carry out.

use std::{fmt, time::Duration};

use lapin::ErrorKind;
use tokio::time::timeout;

/// For one request to the broker that it should answer at once.
pub(super) const RPC_TIMEOUT: Duration = Duration::from_secs(20);

/// What the broker said to a request, or that it said nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BrokerError {
    /// AMQP's reply code.
    pub(super) code: Option<u16>,
    /// It did not answer in time.
    pub(super) silent: bool,
    pub(super) text: String,
}

/// The reply code with which the broker closes a connection over a queue that it has lost the use
/// of.
pub(super) const INTERNAL_ERROR: u16 = 541;
pub(super) const NOT_FOUND: u16 = 404;
/// Another connection has it for itself.
pub(super) const RESOURCE_LOCKED: u16 = 405;

impl From<&lapin::Error> for BrokerError {
    /// In the broker's words, without the URL.
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
/// leader answers nobody, and lapin waits without end.
///
/// # Errors
/// What the broker said, or that it said nothing.
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
