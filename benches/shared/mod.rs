//! Shared by the benchmarks: an event, the cheapest receiver, a process's figures.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// 400 bytes, as the audit events of the field are.
pub(crate) const EVENT: &str = concat!(
    r#"{"event":"activity_log.user.updated","description":"updated the user profile","actor":{"id":783,"type":"user","name":"Jane Doe"},"#,
    r#""resource":{"id":"783","type":"user","name":"Jane Doe"},"changes":{"name":{"to":"[FILTERED]","from":"[FILTERED]"},"#,
    r#""time_zone":{"from":"Etc/UTC","to":"Europe/Kyiv"},"locale":{"from":"en","to":"de"},"theme":{"from":"light","to":"dark"}"#,
    r#","x":"yyyyyy"},"timestamp":1733739084}"#
);
pub(crate) const BATCH: usize = 100;
const FRAME: usize = r#"{"events":[]}"#.len();

const _: () = assert!(EVENT.len() == 400);

pub(crate) fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

/// CPU seconds and peak MiB of a process so far.
pub(crate) fn process_figures(pid: u32) -> (f64, f64) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let fields: Vec<&str> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
    let ticks: f64 =
        fields[11].parse::<f64>().expect("utime") + fields[12].parse::<f64>().expect("stime");
    (ticks / 100.0, crate::support::peak_mib(pid)) // Linux reports times in hundredths of a second
}

pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[derive(Default)]
pub(crate) struct Counter {
    pub(crate) events: AtomicU64,
    pub(crate) times: Mutex<Option<(Instant, Instant)>>,
}

impl Counter {
    fn seen(&self, now: Instant) {
        let mut times = self.times.lock().expect("not poisoned");
        *times = Some((times.map_or(now, |(first, _)| first), now));
    }
}

/// The cheapest receiver that is one: reads each request by its length and accepts it.
pub(crate) async fn receive(counter: Arc<Counter>) -> String {
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/", socket.local_addr().expect("an address"));
    tokio::spawn(async move {
        while let Ok((stream, _)) = socket.accept().await {
            tokio::spawn(answer(stream, counter.clone()));
        }
    });
    url
}

async fn answer(mut stream: TcpStream, counter: Arc<Counter>) {
    let mut buffer = Vec::with_capacity(1 << 16);
    loop {
        let head = loop {
            if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
                return;
            }
        };
        let text = std::str::from_utf8(&buffer[..head]).expect("a head").to_ascii_lowercase();
        let length: usize = text
            .split("content-length: ")
            .nth(1)
            .and_then(|l| l.split("\r\n").next())
            .expect("a length")
            .parse()
            .expect("a number");
        while buffer.len() < head + length {
            if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
                return;
            }
        }
        buffer.drain(..head + length);
        let now = Instant::now();
        // All events have the same length, so the length of a body gives their number.
        counter
            .events
            .fetch_add(((length - FRAME + 1) / (EVENT.len() + 1)) as u64, Ordering::Relaxed);
        counter.seen(now);
        if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.is_err() {
            return;
        }
    }
}
