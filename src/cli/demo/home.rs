//! The demo's directory, with a configuration like any other.

use std::{fmt::Write as _, os::unix::fs::DirBuilderExt as _, path::Path};

use serde_json::json;

use super::receiver::Receiver;
use crate::{
    cli::{failed::Failed, secret::new_token},
    config::{self, Config},
};

/// A directory that is removed at the end of the demo.
pub(super) struct Home(pub(super) std::path::PathBuf);

impl Home {
    pub(super) fn new() -> Result<Self, Failed> {
        let path =
            std::env::temp_dir().join(format!("hooktrail-demo-{:08x}", rand::random::<u32>()));
        // The directory gets the URL of a RabbitMQ, password included.
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(|e| {
            Failed::Runtime(format!("{} cannot be made: {e}; set TMPDIR", path.display()))
        })?;
        Ok(Self(path))
    }

    /// A configuration like any other, with short times.
    pub(super) fn config(
        &self,
        amqp: Option<&str>,
        secret: &str,
        receivers: &[&Receiver],
    ) -> Result<Config, Failed> {
        let name = self.0.file_name().unwrap_or_default().to_string_lossy();
        // TOML has the escapes of JSON.
        let url = json!(amqp.unwrap_or("embedded")).to_string().replace("${", "$${");
        let token = new_token();
        // What is made in the console is deleted with the directory, and not with a RabbitMQ's queues.
        let manage = amqp.is_none();
        let mut text = format!(
            "[admin]\nlisten = \"127.0.0.1:0\"\ntoken = \"{token}\"\nmanage = {manage}\n\
             [admin.api_subscribers]\nallow_http = true\nallow_addresses = [\"127.0.0.0/8\"]\n\
             [queue]\nurl = {url}\nexchange = \"{name}\"\nprefix = \"{name}\"\n\
             [batch]\nmax_events = 50\nmax_bytes = \"32KiB\"\nmax_wait = \"400ms\"\n\
             [http]\nallow_http = true\nallow_private_addresses = true\ntimeout = \"5s\"\n\
             [retry]\ninitial_interval = \"500ms\"\nmultiplier = 1.5\nmax_interval = \"2s\"\nmax_attempts = 6\n\
             [circuit_breaker]\nfailures = 3\nopen_for = \"1500ms\"\nmax_open_for = \"3s\"\n"
        );
        for r in receivers {
            // Writing to a string cannot fail.
            write!(
                text,
                "[[subscriber]]\nname = \"{}\"\nurl = \"{}\"\nsecrets = [\"{secret}\"]\nevents = [\"activity_log.#\"]\n",
                r.name, r.url
            )
            .ok();
        }
        let path = self.0.join("hooktrail.toml");
        std::fs::write(&path, text)?;
        config::load(&path).map_err(|e| match amqp {
            Some(_) => Failed::Usage("--amqp is not the URL of a RabbitMQ, such as amqp://guest:guest@127.0.0.1:5672/%2f".to_owned()),
            None => Failed::Config(e),
        })
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        std::fs::remove_dir_all(Path::new(&self.0)).ok(); // it is in the directory for what may be deleted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn no_other_user_can_read_the_url_that_the_demo_stores() {
        let home = Home::new().expect("makes a directory");
        assert_eq!(std::fs::metadata(&home.0).expect("is there").mode() & 0o777, 0o700);
        let path = home.0.clone();
        drop(home);
        assert!(!path.exists());
    }
}
