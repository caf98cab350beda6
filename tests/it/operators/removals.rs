//! Absent files of the configuration, whose subscribers must not be treated as removed.

use std::{
    fs,
    path::PathBuf,
    pin::pin,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::support::{
    api::Api,
    broker::kill,
    daemon::{Daemon, QUICK, Setup, subscriber},
    eventually,
    queue::{Queue, Section, on_both_queues},
    receiver::{Receiver, event},
};

on_both_queues!(
    a_folder_that_is_moved_away_removes_no_subscriber,
    a_folder_that_cannot_be_read_is_a_mistake_with_its_place,
    a_reload_that_would_remove_everybody_waits_for_an_operator,
    a_start_without_its_folder_unbinds_no_subscriber,
    a_start_that_is_meant_is_made_to_happen_by_an_operator,
    a_file_that_ends_between_two_subscribers_while_it_is_copied_removes_no_subscriber,
);

const TYPE: &str = "activity_log.user.updated";

/// A daemon whose subscribers are in files of their own.
struct World {
    queue: Queue,
    api: Api,
    receiver: Receiver,
    setup: Setup,
}

impl World {
    async fn new(queue: Queue, names: &[&str]) -> Self {
        let (api, receiver) = (Api::new(), Receiver::accepting().await);
        let text = format!(
            "include = [\"subs/*.toml\"]\n{}{QUICK}{}",
            queue.section(&["a", "b", "c", "d", "e"]),
            api.section()
        );
        let world = Self { setup: Setup::with_text(&text), queue, api, receiver };
        fs::create_dir(world.folder()).expect("makes");
        names.iter().for_each(|name| world.write(name));
        world
    }

    fn folder(&self) -> PathBuf {
        self.setup.config().with_file_name("subs")
    }

    fn away(&self) -> PathBuf {
        self.setup.config().with_file_name("away")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.toml"))
    }

    fn write(&self, name: &str) {
        fs::write(self.file(name), subscriber(name, &self.receiver.url, "")).expect("writes");
    }

    fn move_away(&self) {
        fs::rename(self.folder(), self.away()).expect("moves");
    }

    fn put_back(&self) {
        fs::rename(self.away(), self.folder()).expect("moves");
    }

    /// Publishes this event, and waits until this many subscribers have got it.
    async fn reaches(&self, n: u64, subscribers: usize) {
        self.queue.publish(TYPE, [event(n)]).await;
        self.arrives(n, subscribers).await;
    }

    async fn arrives(&self, n: u64, subscribers: usize) {
        eventually(&format!("event {n} comes to {subscribers} subscribers"), async || {
            self.receiver.accepted().iter().filter(|found| **found == n).count() == subscribers
        })
        .await;
    }

    async fn held(&self) -> Value {
        self.api.get("/api/v1/subscribers").await.json()["config"]["held"].clone()
    }

    async fn wait_held(&self, names: &[&str]) {
        eventually(&format!("{names:?} are held"), async || {
            self.held().await["subscribers"] == json!(names)
        })
        .await;
        let ready = self.api.get("/readyz").await;
        assert!(ready.status == 200 && ready.text.contains("hooktrail reload"), "{ready:?}");
        assert_eq!(self.api.metric("hooktrail_held_removals").await, Some(names.len() as f64));
        assert!(self.setup.ok(&["status"]).contains("hooktrail reload"));
    }

    async fn wait_nothing_held(&self) {
        eventually("nothing is held, and nothing wrong", async || {
            self.api.get("/readyz").await.text == "ready\n"
        })
        .await;
        assert_eq!(
            (self.held().await, self.api.metric("hooktrail_held_removals").await),
            (Value::Null, Some(0.0))
        );
    }
}

fn count(daemon: &Daemon, text: &str) -> usize {
    daemon.log().matches(text).count()
}

const REFUSED: &str = "the configuration was not reloaded";

async fn a_folder_that_is_moved_away_removes_no_subscriber(queue: Queue) {
    let world = World::new(queue, &["a", "b"]).await;
    let daemon = world.setup.start().await;
    world.reaches(0, 2).await;
    world.move_away();
    daemon.wait_log(REFUSED).await;
    let log = daemon.log();
    let line = log.lines().find(|l| l.contains(REFUSED)).expect("just seen");
    for part in [
        "hooktrail.toml:1:12: include[0]",
        &world.folder().display().to_string(),
        "remove the pattern",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    world.reaches(1, 2).await;
    // It stays a mistake in each answer, until the folder is back.
    assert_eq!(world.api.post("/api/v1/reload", "{}").await.status, 422);
    world.put_back();
    world.wait_nothing_held().await;
    world.reaches(2, 2).await;
    // To be without it, the pattern goes.
    world.move_away();
    let text = fs::read_to_string(world.setup.config())
        .expect("reads")
        .replace("include = [\"subs/*.toml\"]", "");
    fs::write(world.setup.config(), text).expect("writes");
    assert_eq!(world.setup.ok(&["reload"]), "removed `a`\nremoved `b`\n");
}

async fn a_folder_that_cannot_be_read_is_a_mistake_with_its_place(queue: Queue) {
    let world = World::new(queue, &["a"]).await;
    let _daemon = world.setup.start().await;
    world.reaches(0, 1).await;
    let folder = world.folder();
    let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    let locked = || {
        world.put_back();
        fs::set_permissions(&folder, mode(0o000)).expect("locks");
        // Root may read everything.
        fs::read_dir(&folder).is_err()
    };
    let conditions: [(&str, &dyn Fn() -> bool); 3] = [
        ("a file in its place", &|| fs::write(&folder, "").is_ok()),
        ("a link that leads to itself", &|| std::os::unix::fs::symlink("subs", &folder).is_ok()),
        ("one that this user may not read", &locked),
    ];
    for (n, (what, make)) in conditions.into_iter().enumerate() {
        world.move_away();
        if make() {
            let refused = world.api.post("/api/v1/reload", "{}").await;
            let why = refused.text.clone();
            for part in ["hooktrail.toml:1:12: include[0]", &folder.display().to_string()] {
                assert!(
                    refused.status == 422 && why.contains(part),
                    "{what}: {part} is not in {refused:?}"
                );
            }
            world.reaches(n as u64 + 1, 1).await;
            let start = world.setup.run(&["check"]);
            assert_eq!(
                start.status.code(),
                Some(2),
                "{what}: a start with it would not see its subscribers"
            );
        }
        if world.away().exists() {
            fs::remove_file(&folder).expect("removes");
            world.put_back();
        } else {
            fs::set_permissions(&folder, mode(0o755)).expect("unlocks");
        }
    }
    assert_eq!(world.api.post("/api/v1/reload", "{}").await.status, 200);
}

async fn a_reload_that_would_remove_everybody_waits_for_an_operator(queue: Queue) {
    let world = World::new(queue, &["a", "b", "c", "d", "e"]).await;
    let daemon = world.setup.start().await;
    world.reaches(0, 5).await;
    // Less than half: such a change is meant.
    fs::remove_file(world.file("e")).expect("removes");
    daemon.wait_log("removed=\"e\"").await;
    world.reaches(1, 4).await;
    let rest = ["a", "b", "c", "d"];
    rest.iter().for_each(|name| fs::remove_file(world.file(name)).expect("removes"));
    world.wait_held(&rest).await;
    assert_eq!(count(&daemon, REFUSED), 1, "it is logged once");
    assert_eq!(world.api.metric("hooktrail_config_last_reload_successful").await, Some(0.0));
    let preview = world.api.get("/api/v1/reload").await.json();
    assert_eq!(
        (preview["changes"].as_array().map(Vec::len), &preview["waits_for_operator"]),
        (Some(4), &json!(true))
    );
    let plan = world.setup.run_as("COLUMNS=400 exec \"$0\" \"$@\"", &["plan"]);
    let plan = String::from_utf8_lossy(&plan.stdout).into_owned();
    assert!(
        plan.contains("  d: removed\n  (it removes all subscribers")
            && plan.contains("`hooktrail reload` or SIGHUP does)"),
        "{plan}"
    );
    let plan: Value = serde_json::from_str(&world.setup.ok(&["plan", "--json"])).expect("JSON");
    assert_eq!(plan["daemon"]["reload"]["waits_for_operator"], true);
    world.reaches(2, 4).await;
    // Back, and away again but for one: more than half of four.
    rest.iter().for_each(|name| world.write(name));
    world.wait_nothing_held().await;
    rest[1..].iter().for_each(|name| fs::remove_file(world.file(name)).expect("removes"));
    world.wait_held(&rest[1..]).await;
    world.reaches(3, 4).await;
    assert_eq!(world.setup.ok(&["reload"]), "removed `b`\nremoved `c`\nremoved `d`\n");
    world.wait_nothing_held().await;
    // A signal is an operator's word too.
    fs::remove_file(world.file("a")).expect("removes");
    kill("-HUP", daemon.pid());
    daemon.wait_log("because=\"SIGHUP\" removed=\"a\"").await;
    assert!(daemon.stop().await.success());
}

async fn a_start_without_its_folder_unbinds_no_subscriber(queue: Queue) {
    let world = World::new(queue, &["a", "b"]).await;
    let daemon = world.setup.start().await;
    world.reaches(0, 2).await;
    recorded(&world.queue).await;
    assert!(daemon.stop().await.success());
    world.move_away();
    let daemon = world.setup.start().await;
    world.wait_held(&["a", "b"]).await;
    assert_eq!(count(&daemon, "not unbound"), 1, "it is logged once");
    let answered = world.api.post("/api/v1/events", &event(1)).await;
    assert_eq!(
        answered.json(),
        json!({ "accepted": 1, "unmatched": 0 }),
        "both are bound, and get it"
    );
    world.queue.wait_backlog("a", 1).await;
    world.queue.wait_backlog("b", 1).await;
    world.put_back();
    world.arrives(1, 2).await;
    world.wait_nothing_held().await;
    world.reaches(2, 2).await;
    assert!(daemon.stop().await.success());
}

async fn a_start_that_is_meant_is_made_to_happen_by_an_operator(queue: Queue) {
    let world = World::new(queue, &["a", "b", "c", "d"]).await;
    let daemon = world.setup.start().await;
    world.reaches(0, 4).await;
    recorded(&world.queue).await;
    assert!(daemon.stop().await.success());
    ["a", "b", "c"].iter().for_each(|name| fs::remove_file(world.file(name)).expect("removes"));
    world.write("e");
    let daemon = world.setup.start().await;
    world.wait_held(&["a", "b", "c"]).await;
    // Subscribers that stay and new ones are served.
    world.reaches(1, 2).await;
    world.queue.wait_backlog("a", 1).await;
    // A change without a request does not confirm it.
    world.write("c");
    world.arrives(1, 3).await;
    world.wait_held(&["a", "b"]).await;
    assert_eq!(world.setup.ok(&["reload"]), "Nothing has changed.\n");
    world.wait_nothing_held().await;
    eventually("they get no more", async || {
        let before = (world.queue.backlog("a").await, world.queue.backlog("b").await);
        world.queue.publish(TYPE, [event(2)]).await;
        (world.queue.backlog("a").await, world.queue.backlog("b").await) == before
    })
    .await;
    assert!(world.queue.backlog("a").await >= 1, "its backlog stays");
    assert!(daemon.stop().await.success());
}

/// The pause of a copy: the daemon polls each second, and accepts a file that has only grown at
/// the second poll.
const RESTS: Duration = Duration::from_secs(5);

/// A file that has shrunk is taken for what is meant after 10 s. With a second to spare.
const MEANT: Duration = Duration::from_secs(9);

async fn a_file_that_ends_between_two_subscribers_while_it_is_copied_removes_no_subscriber(
    queue: Queue,
) {
    let world = World::new(queue, &[]).await;
    let names = ["a", "b", "c"];
    let tables: Vec<String> =
        names.iter().map(|name| subscriber(name, &world.receiver.url, "")).collect();
    let file = world.file("all");
    fs::write(&file, tables.concat()).expect("writes");
    let daemon = world.setup.start().await;
    world.reaches(0, 3).await;
    // First without the last one, which is no more than a reload may remove by itself. The copy
    // does not wait for the events.
    let (cut, whole) = ([&tables[..2], &tables[..1]].map(<[String]>::concat), tables.concat());
    let mut copying = tokio::spawn({
        let file = file.clone();
        async move {
            let mut longest = Duration::ZERO;
            for part in &cut {
                fs::write(&file, part).expect("writes");
                let begun = Instant::now();
                sleep(RESTS).await;
                longest = longest.max(begun.elapsed());
            }
            fs::write(&file, whole).expect("writes");
            longest
        }
    });
    let mut n = 0;
    loop {
        n += 1;
        let mut reached = pin!(world.reaches(n, 3));
        tokio::select! {
            longest = &mut copying => {
                let longest = longest.expect("it is copied");
                assert!(longest < MEANT, "{longest:?}: this machine is too busy to copy the file before the daemon may take the cut for meant");
                reached.await;
                break;
            }
            () = &mut reached => {}
        }
    }
    daemon.wait_log("the configuration was read again; it means the same").await;
    world.reaches(n + 1, 3).await;
    let log = daemon.log();
    assert!(!log.contains("removed=") && !log.contains(REFUSED), "{log}");
    assert_eq!(world.held().await, Value::Null);
    // A change that stays is meant.
    fs::write(&file, tables[..2].concat()).expect("writes");
    daemon.wait_log("removed=\"c\"").await;
    world.reaches(n + 2, 2).await;
    assert!(daemon.stop().await.success());
}

/// Waits until the bound subscribers stand in the queue's record.
async fn recorded(queue: &Queue) {
    if let Queue::Amqp(broker) = queue {
        // A mark, and who is bound.
        eventually("it is recorded", async || broker.depth("state").await >= Some(3)).await;
    }
}
