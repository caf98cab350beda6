//! The way to a broker, which a test may cut.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
};

pub(crate) struct Wire {
    /// The broker's, by this way.
    pub(crate) url: String,
    loses: Arc<AtomicBool>,
    cuts: watch::Sender<u32>,
}

impl Wire {
    pub(crate) async fn to(broker: &str) -> Self {
        let mut url = url::Url::parse(broker).expect("a URL");
        let to = (url.host_str().expect("a host").to_owned(), url.port().unwrap_or(5672));
        let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        url.set_host(Some("127.0.0.1")).expect("a host");
        url.set_port(Some(socket.local_addr().expect("an address").port())).expect("a port");
        let (loses, cuts) = (Arc::<AtomicBool>::default(), watch::Sender::new(0));
        let (lost, cut) = (loses.clone(), cuts.subscribe());
        tokio::spawn(async move {
            while let Ok((client, _)) = socket.accept().await {
                let (to, lost, mut cut) = (to.clone(), lost.clone(), cut.clone());
                tokio::spawn(async move {
                    cut.mark_unchanged();
                    let Ok(broker) = TcpStream::connect(to).await else { return };
                    let ((from_client, to_client), (from_broker, to_broker)) =
                        (client.into_split(), broker.into_split());
                    tokio::select! {
                        _ = cut.changed() => {}
                        () = pass(from_client, to_broker, Some(&lost)) => {}
                        () = pass(from_broker, to_client, None) => {}
                    }
                });
            }
        });
        Self { url: url.to_string(), loses, cuts }
    }

    /// Ends all connections. What the clients say in the last `deaf` before that does not arrive.
    pub(crate) async fn cut(&self, deaf: Duration) {
        self.loses.store(!deaf.is_zero(), Ordering::SeqCst);
        tokio::time::sleep(deaf).await;
        self.cuts.send_modify(|n| *n += 1);
        self.loses.store(false, Ordering::SeqCst);
    }
}

async fn pass(
    mut from: tcp::OwnedReadHalf,
    mut to: tcp::OwnedWriteHalf,
    lost: Option<&AtomicBool>,
) {
    let mut buffer = vec![0; 64 * 1024];
    // A loss leaves a hole: nothing after it may arrive.
    let mut deaf = false;
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        deaf |= lost.is_some_and(|lost| lost.load(Ordering::SeqCst));
        if !deaf && to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}
