//! A stranger that listens where a daemon is expected, and answers as it likes.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::{Arc, Mutex},
};

use hooktrail::crypto::{
    handshake::{self, Side},
    secret::Secret,
};
use serde_json::{Value, json};

pub(crate) struct Impostor {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Impostor {
    /// `answers` gets the head of each request and the port, and gives the status and the body; with
    /// the status 0 the connection is closed instead.
    pub(crate) fn start(
        mut answers: impl FnMut(&str, u16) -> (u16, Value) + Send + 'static,
    ) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = socket.local_addr().expect("an address");
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = asked.clone();
        // It ends with the tests.
        std::thread::spawn(move || {
            for stream in socket.incoming().map_while(Result::ok) {
                let mut head = String::new();
                let mut lines = BufReader::new(&stream);
                while !head.ends_with("\r\n\r\n") && lines.read_line(&mut head).is_ok_and(|n| n > 0)
                {
                }
                // A connection that is closed before its body is read is reset.
                let length = head.lines().find_map(|l| l.strip_prefix("content-length: "));
                let mut body = vec![0; length.and_then(|n| n.parse().ok()).unwrap_or(0)];
                lines.read_exact(&mut body).ok(); // the client may be gone
                let (status, body) = answers(&head, address.port());
                heard.lock().expect("not poisoned").push(head);
                if status == 0 {
                    continue;
                }
                let (body, kind) = (body.to_string(), "content-type: application/json");
                let answer = format!(
                    "HTTP/1.1 {status} x\r\n{kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                (&stream).write_all(answer.as_bytes()).ok(); // the client may be gone
            }
        });
        Self { address, asked }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The heads of all requests so far.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("not poisoned").clone()
    }
}

/// The introduction of a configuration's daemon to a command with this token.
pub(crate) fn introduction(head: &str, port: u16, config: &Path, token: &str) -> Value {
    let challenge =
        head.lines().find_map(|l| l.strip_prefix("x-hooktrail-challenge: ")).unwrap_or_default();
    let proof = handshake::proof(&Secret::new(token), Side::Daemon, challenge, port);
    json!({ "version": "1", "config": config.display().to_string(), "pid": 1, "proof": proof })
}
