//! A TCP proxy between two parties that can be made to fail in each way that a network does.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// The direction of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From who connected.
    Forth,
    Back,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weather {
    Fine,
    /// Nothing arrives, and no end sees an error.
    Stalled,
    /// Bytes of one direction wait, those of the other arrive.
    OneWay(Way),
    /// Bytes of one direction are lost. The stream is unusable afterwards: its connections are then
    /// to be cut.
    Loses(Way),
    /// Bytes a second in each direction.
    Slow(usize),
    /// New connections are reset.
    Refuses,
}

/// The end of the open connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Reset,
    /// Nothing more comes, this way; the other stays open.
    Half(Way),
}

pub(crate) struct Proxy {
    pub(crate) port: u16,
    weather: watch::Sender<Weather>,
    endings: watch::Sender<Option<Ending>>,
    open: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// To the first of them that takes a connection.
    pub(crate) async fn to(targets: Vec<SocketAddr>) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = socket.local_addr().expect("an address").port();
        let (weather, endings) = (watch::Sender::new(Weather::Fine), watch::Sender::new(None));
        let open = Arc::new(AtomicUsize::new(0));
        let (w, e, count) = (weather.clone(), endings.clone(), open.clone());
        let task = tokio::spawn(async move {
            while let Ok((from, _)) = socket.accept().await {
                if *w.borrow() == Weather::Refuses {
                    from.set_zero_linger().ok();
                    continue;
                }
                let (weather, endings, count, targets) =
                    (w.subscribe(), e.subscribe(), count.clone(), targets.clone());
                tokio::spawn(async move {
                    let Ok(to) = TcpStream::connect(&targets[..]).await else {
                        from.set_zero_linger().ok();
                        return;
                    };
                    count.fetch_add(1, Ordering::SeqCst);
                    carry(from, to, weather, endings).await;
                    count.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { port, weather, endings, open, task }
    }

    pub(crate) fn weather(&self, weather: Weather) {
        let before = self.weather.send_replace(weather);
        if matches!(before, Weather::Loses(_)) {
            self.cut();
        }
    }

    /// Resets all connections.
    pub(crate) fn cut(&self) {
        self.endings.send_replace(Some(Ending::Reset));
    }

    /// Ends all connections, one way.
    pub(crate) fn half_close(&self, way: Way) {
        self.endings.send_replace(Some(Ending::Half(way)));
    }

    pub(crate) fn connections(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(
    from: TcpStream,
    to: TcpStream,
    weather: watch::Receiver<Weather>,
    mut endings: watch::Receiver<Option<Ending>>,
) {
    endings.mark_unchanged();
    from.set_nodelay(true).ok();
    to.set_nodelay(true).ok();
    let ((from_read, from_write), (to_read, to_write)) = (from.into_split(), to.into_split());
    let forth = pump(from_read, to_write, Way::Forth, weather.clone(), endings.clone());
    let back = pump(to_read, from_write, Way::Back, weather, endings);
    tokio::join!(forth, back);
}

/// Carries bytes one way until that ends.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    way: Way,
    mut weather: watch::Receiver<Weather>,
    mut endings: watch::Receiver<Option<Ending>>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let now = *weather.borrow_and_update();
        let waits = now == Weather::Stalled || now == Weather::OneWay(way);
        let limit = if let Weather::Slow(rate) = now {
            (rate / 20).clamp(1, buffer.len())
        } else {
            buffer.len()
        };
        let read = tokio::select! {
            biased;
            ended = endings.changed() => {
                let ending = if ended.is_ok() { *endings.borrow_and_update() } else { Some(Ending::Reset) };
                match ending {
                    Some(Ending::Half(which)) if which == way => {
                        to.shutdown().await.ok();
                        return;
                    }
                    Some(Ending::Half(_)) => continue,
                    Some(Ending::Reset) | None => return reset(&from, &to),
                }
            }
            changed = weather.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return reset(&from, &to),
            },
            read = from.read(&mut buffer[..limit]), if !waits => read,
        };
        match read {
            Ok(0) => {
                to.shutdown().await.ok();
                return;
            }
            Ok(n) => {
                if now == Weather::Loses(way) {
                    continue;
                }
                // A peer that does not read must not keep an ending from being seen.
                let written = tokio::select! {
                    written = to.write_all(&buffer[..n]) => written.is_ok(),
                    _ = endings.changed() => false,
                };
                if !written {
                    return reset(&from, &to);
                }
                if let Weather::Slow(_) = now {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            Err(_) => return reset(&from, &to),
        }
    }
}

fn reset(from: &OwnedReadHalf, to: &OwnedWriteHalf) {
    from.as_ref().set_zero_linger().ok();
    to.as_ref().set_zero_linger().ok();
}
