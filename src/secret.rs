//! Values that must not be printed.

use std::fmt;

use url::Url;

/// A secret text. It has no `Display` and no `Serialize`, and its `Debug` shows nothing of it, so
/// that a log line, an error or a dump of the configuration cannot contain it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself. Whoever calls this answers for where it goes.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// A URL that may carry secrets in its userinfo, path or query. What it shows of itself is the
/// origin alone: scheme, host and port.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl(Url);

impl SecretUrl {
    pub fn new(url: Url) -> Self {
        Self(url)
    }

    /// The whole URL. Whoever calls this answers for where it goes.
    pub fn expose(&self) -> &Url {
        &self.0
    }

    fn origin(&self) -> String {
        let port = self.0.port().map(|p| format!(":{p}")).unwrap_or_default();
        format!("{}://{}{port}", self.0.scheme(), self.0.host_str().unwrap_or_default())
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.origin())
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_ever_printed() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret:?} {:#?}", vec![&secret]), "[redacted] [\n    [redacted],\n]");
        let url = SecretUrl::new("https://u:p@example.com:8443/hook/TOKEN?k=v#f".parse().expect("a URL"));
        assert_eq!(format!("{url} {url:?}"), "https://example.com:8443 https://example.com:8443");
        let amqp = SecretUrl::new("amqp://guest:guest@broker/vhost".parse().expect("a URL"));
        assert_eq!(amqp.to_string(), "amqp://broker");
    }
}
